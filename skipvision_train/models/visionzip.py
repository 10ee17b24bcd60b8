"""VisionZip (arXiv 2412.04467, Sec. 3; selection and merging as in its public code) before LLaVA's projector.

Shapes: B tiles, n patches, r patches that are not dominant, c contextual tokens, D channels per head of the tower, W of
the tower, C of the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from skipvision_train.models.connector_settings import MlpConfig, VisionZipConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.mlp import MlpProjector
from skipvision_train.models.selection import partition, top_salient


class VisionZip(MlpProjector):
    """The tokens that the class token attends to, and the rest merged into a few, before LLaVA's projector.

    Nothing but the projector has weights: it is LLaVA's, with the same parameter names and the same start. The choice
    of tokens has no gradient, the tokens have one.

    Args:
        config: dominant and contextual tokens, layers of the projector.
        vision_width: W.
        llm_width: C.
    """

    def __init__(self, config: VisionZipConfig, vision_width: int, llm_width: int) -> None:
        super().__init__(MlpConfig(layers=config.layers), vision_width, llm_width)
        self.dominant = config.dominant
        self.contextual = config.contextual

    def forward(self, features: VisionFeatures) -> list[Tensor]:
        """Select, merge, project.

        Args:
            features: of a tower with ``readout="attention"``; the last of ``states`` is read, (B, n, W).

        Returns:
            one level: (B, dominant + contextual, C): the class token, the ``dominant - 1`` most salient patches in
            raster order, the contextual tokens in the raster order of their targets.

        Raises:
            ValueError: features without the class token's attention, or fewer patches than tokens are wanted.
        """
        state, cls, saliency, keys = features.states[-1], features.cls, features.saliency, features.keys
        if cls is None or saliency is None or keys is None:
            raise ValueError("features: no class token, saliency or keys; VisionZip needs a tower with attention read")
        kept = top_salient(saliency, self.dominant - 1)
        dominant, rest = partition(state, kept)
        contextual = merge_contextual(rest, partition(keys, kept)[1], self.contextual)
        return [self.project(torch.cat([cls[:, None], dominant, contextual], dim=1))]


def merge_contextual(tokens: Tensor, keys: Tensor, count: int) -> Tensor:
    """Merge tokens into evenly spaced ones among them: each target plus the mean of what was assigned to it.

    Targets are every ``r // count``-th token, from the first. Each other token goes to the target whose key has the
    largest cosine with its own, of equals the first. As in the public code the result is a sum, not a mean: about twice
    as large as a token, and a target to which nothing was assigned stays as it is. With ``count`` equal to r there are
    targets only, and they come back unchanged (the same there). Fewer tokens than targets, also none at all, fail there
    inside a tensor operation; here they are refused. A key of zeros gives NaN there and a cosine of 0 here.

    Args:
        tokens: (B, r, W), any float dtype; the gradient goes to them alone.
        keys: (B, r, D), compared in fp32 whether or not autocast is on.
        count: c, 1 to r.

    Returns:
        (B, c, W) in the dtype of ``tokens``.

    Raises:
        ValueError: ``count`` is out of range.
    """
    total = tokens.shape[1]
    if not 1 <= count <= total:
        raise ValueError(f"contextual: {count} of {total} tokens that are not dominant; use 1 to {total}")
    targets = (torch.arange(count, device=tokens.device) * (total // count)).expand(len(tokens), -1)
    chosen, others = partition(tokens, targets)
    # Autocast would round the factors of both products to half precision.
    with torch.autocast(tokens.device.type, enabled=False):
        target_keys, other_keys = partition(F.normalize(keys.float(), dim=-1), targets)
        receiver = (other_keys @ target_keys.transpose(1, 2)).argmax(dim=-1)
        assigned = receiver[:, None, :] == torch.arange(count, device=tokens.device)[:, None]
        # Counted in fp32: half precision holds no whole numbers above 256.
        sizes = assigned.sum(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1)
        # A product with a matrix, not a scatter: it sums in fp32 inside the kernel and is deterministic on a GPU. The
        # weights are divided, not the sums: hundreds of tokens may add up to more than fp16 holds.
        return chosen + (assigned / sizes).to(tokens.dtype) @ others
