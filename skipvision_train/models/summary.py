"""The adaptive summary token (Skip-Vision, Sec. 4.2, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveSummary(nn.Module):
    """One token that is a learned, softmax-weighted sum of the tokens it is given.

    ``softmax(W LN(X))^T X``. The paper's Eq. 6 has no LayerNorm, the released code does, and so does this; the sum runs
    over the tokens as they come, not over the normed ones. Neither the LayerNorm nor the linear map has a bias: both
    would add the same number to every token's score, which the softmax cancels, so they could never learn anything.

    Args:
        width: C, channels of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.trunc_normal_(self.score.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Summarise (B, N, C) into (B, 1, C), in the dtype of ``tokens``; the softmax runs in fp32.

        Args:
            tokens: (B, N, C).
            mask: (B, N) bool, False on padding, at least one True per row; None means all tokens count.
        """
        scores = self.score(self.norm(tokens)).squeeze(-1).float()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
            tokens = tokens.masked_fill(~mask[..., None], 0.0)
        return scores.softmax(dim=-1).to(tokens.dtype)[:, None, :] @ tokens
