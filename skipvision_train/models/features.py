"""What the vision tower hands to a connector. Shapes: B tiles, g patches per side, W channels, D channels per head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class VisionFeatures(NamedTuple):
    """A tower's hidden states, and what its class token says about the patches.

    A tuple, because ZeRO-3 finds tensors in tuples, lists and dicts only: from anything else its backward pass would
    not gather the tower's weights.

    Attributes:
        states: (B, g * g, W) per depth that is read, in the order of ``VisionConfig.depths``; raster order.
        cls: (B, W), the class token of the last of these depths; None unless it was asked for.
        saliency: (B, g * g) fp32, how much the class token makes of each patch; None unless it was asked for. With
            ``attention`` the class token's row in the block whose output is the last depth, summed over heads; with
            ``similarity`` its cosine with the patch in the last depth. No gradient.
        keys: (B, g * g, D), the keys of that block, mean over heads; None unless ``attention`` was asked for.
    """

    states: tuple[Tensor, ...]
    cls: Tensor | None = None
    saliency: Tensor | None = None
    keys: Tensor | None = None
