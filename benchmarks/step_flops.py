"""FLOPs of a training step: the forward pass as ``skipvision_train.analysis`` counts it, and what a backward pass adds.

Matrix products only, 2 FLOPs per multiply-add. A product of the forward pass has two in the backward pass, each as
large as itself: one for the gradient of either factor. A gradient that nobody asks for costs nothing: a frozen tower
has no backward pass, and the first layer that trains computes none for its input (pixels, or a frozen tower's
features). Merging decides without a gradient and averages with one, towards the tokens alone. Gradient checkpointing
runs decoder layers, and the blocks of a tower that trains, once more; that torch may leave out a layer's last product
then is not counted, nor are the two products of a summary token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from skipvision_train.analysis.flops import lm_head_flops, sequence_flops
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.merging import merge_rounds
from skipvision_train.plans import TokenKind

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOPs per second of the SXM modules, by a part of the device's name (NVIDIA's data sheets)."""

OTHERS = ("H100 PCIe", "H100 NVL", "H200 NVL", "GH200")
"""Devices whose names contain one of ``PEAK`` and whose peak is another."""


@dataclass(frozen=True)
class Row:
    """One row of a batch: an image and its text.

    Attributes:
        text: text tokens.
        supervised: positions at which the LM head runs.
        tiles: tiles of the image.
    """

    text: int
    supervised: int
    tiles: int


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one row, forward and backward, recomputation included.

    Attributes:
        decoder: its layers.
        lm_head: at the supervised positions.
        vision: the tower, all tiles.
        connector: all tiles.
        merging: similarities and averages of the local tokens.
    """

    decoder: float
    lm_head: float
    vision: float
    connector: float
    merging: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.decoder + self.lm_head + self.vision + self.connector + self.merging


def step_flops(
    config: SkipVisionConfig, row: Row, trains_vision: bool, checkpointing: bool = False, causal: bool = True
) -> StepFlops:
    """FLOPs of one row of a step in which everything trains, except perhaps the tower.

    Args:
        config: the model and, as ``skip_plan``, the plan that it trains under.
        row: what is in a row.
        trains_vision: whether the tower trains.
        checkpointing: whether activations are recomputed.
        causal: count of the decoder's attention what a causal kernel computes; False: all queries times all keys.
    """
    text, vision, patches = config.text_config, config.vision_config, config.vision_config.grid**2
    counts = Counter(config.image_token_kinds(row.tiles)) + Counter({TokenKind.TEXT: row.text})
    forward = image_flops(config, row.tiles)
    decoder = sequence_flops(text, counts, config.plan_or_dense(), causal=causal).total
    tower = forward.vision
    if trains_vision:
        embedding = row.tiles * 2.0 * patches * 3 * vision.patch_size**2 * vision.width
        tower = 3 * tower - embedding + checkpointing * (tower - embedding)
    connector = 3 * forward.connector
    if isinstance(config.connector_config, MlpConfig) and not trains_vision:
        connector -= row.tiles * 2.0 * patches * vision.width * text.hidden_size
    return StepFlops(
        decoder=(4 if checkpointing else 3) * decoder,
        lm_head=3 * lm_head_flops(text, row.supervised),
        vision=tower,
        connector=connector,
        merging=forward.merging + 2 * average_flops(config, row.tiles),
    )


def average_flops(config: SkipVisionConfig, tiles: int) -> float:
    """FLOPs of averaging an image's local tokens, a product with the (kept, tokens) assignment, once per round."""
    reducer, local = config.reducer_config, config.local_tokens(tiles)
    if reducer.merged(local) == local:
        return 0.0
    counts = [local, *merge_rounds(local, reducer.merged(local), reducer.merge_rounds)]
    return sum(2.0 * kept * tokens * config.text_config.hidden_size for tokens, kept in pairwise(counts))


def peak_flops(device_name: str) -> float | None:
    """FLOPs per second that the device could do in bf16; None where this table does not know it."""
    if any(part in device_name for part in OTHERS):
        return None
    return next((peak for part, peak in PEAK.items() if part in device_name), None)
