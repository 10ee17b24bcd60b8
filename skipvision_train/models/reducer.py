"""From the resampler's levels to the language model's visual tokens: merge, summarise, put in order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipvision_train.models.configuration import ReducerConfig
from skipvision_train.models.merging import merge_tokens
from skipvision_train.models.summary import AdaptiveSummary


class Reducer(nn.Module):
    """Arranges one image's tokens as ``SkipVisionConfig.image_token_kinds()`` lays them out.

    ``retained | middle | former | skipped | last local | latter | registers`` (Skip-Vision, Fig. 4). Skipped and last
    local tokens are the finest level, merged if ``local_keep`` says so; merging orders them by falling similarity, so
    the last local one is the most distinctive. Both summary tokens come from one shared module, which exists only if
    there is one. The registers (Victor) are learned embeddings, the same behind every image, which start from a normal
    of standard deviation 0.02.

    Args:
        config: what to merge and to summarise, and how many registers.
        width: C, channels of the language model.
    """

    def __init__(self, config: ReducerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.summary = None if config.summary == "none" else AdaptiveSummary(width)
        self.registers = nn.Parameter(0.02 * torch.randn(config.registers, width)) if config.registers else None

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Reduce the resampler's output.

        Args:
            levels: one (B, n_l, C) per level, coarsest first.

        Returns:
            (B, n, C) with n = ``len(image_token_kinds())``.

        Raises:
            ValueError: fewer than two levels although the finest one skips.
        """
        parts = self._arrange(levels) if self.config.skip_finest else list(levels)
        if self.registers is not None:
            parts.append(self.registers.to(levels[0].dtype).expand(len(levels[0]), -1, -1))
        return torch.cat(parts, dim=1)

    def _arrange(self, levels: list[Tensor]) -> list[Tensor]:
        """Merge and summarise: the parts in their order, without registers."""
        if len(levels) < 2:
            raise ValueError(f"levels: found {len(levels)}, but skipping the finest level needs at least 2")
        *retained, local = levels
        if self.config.local_keep is not None:
            local = merge_tokens(local, self.config.local_keep)
        parts = list(retained)
        if self.summary is not None and self.config.has_former:
            middle_only = self.config.former_over == "middle"
            parts.append(self.summary(retained[-1] if middle_only else torch.cat(retained, dim=1)))
        parts.append(local)
        if self.summary is not None and self.config.has_latter:
            parts.append(self.summary(local))
        return parts
