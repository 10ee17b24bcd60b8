"""What the parts before the language model are: plain, checked values, as ``config.json`` holds them.

Sizes are stated once; counts are derived, so that layouts need no model. Connectors: ``connector_settings.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from skipvision_train.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

TILINGS = ("none", "aspect", "square")
SPLITS = ("none", "finest", "saliency", "tiles")
SUMMARIES = ("none", "former", "latter", "both")
SUMMARISED = ("retained", "middle", "skipped")


def one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is allowed."""
    if value not in allowed:
        raise ConfigError(f"{path}: {value!r} is unknown; use {', '.join(allowed)}")


def positive(path: str, value: int) -> None:
    """Raise ConfigError unless ``value`` is 1 or more."""
    if value < 1:
        raise ConfigError(f"{path}: {value} is out of range; use 1 or more")


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer, and which of its hidden states the connector reads.

    Attributes:
        image_size: pixels per side of the square input; a multiple of ``patch_size``.
        patch_size: pixels per side of a patch.
        width: channels of the transformer.
        layers: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over ``width``.
        quick_gelu: OpenAI's activation ``x * sigmoid(1.702 x)``; with OpenAI weights and plain GELU the features are
            silently wrong.
        depths: hidden states handed to the connector; 0 is the embedding output, i the output of block i (1-based).
        image_mean: per channel, of pixel values in [0, 1].
        image_std: per channel, of pixel values in [0, 1].
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    depths: tuple[int, ...] = (15, 22)
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD

    def __post_init__(self) -> None:
        for name in ("depths", "image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "patch_size", "width", "layers", "heads"):
            positive(f"vision.{name}", getattr(self, name))
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size: {self.image_size} is no multiple of vision.patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"vision.width: {self.width} is no multiple of vision.heads {self.heads}")
        if not self.depths or any(not 0 <= d <= self.layers for d in self.depths):
            raise ConfigError(f"vision.depths: {list(self.depths)} must name hidden states from 0 to {self.layers}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TilingConfig:
    """How an image becomes square tiles of ``vision.image_size``.

    Attributes:
        mode: ``none``: padded to a square, one tile (LLaVA, CoS). ``aspect``: the grid of at most ``max_tiles`` tiles
            whose aspect ratio is closest to the image's (InternVL's rule). ``square``: padded to a square and cut into
            ``max_tiles`` tiles, a square number (what the released LLaVA-HD scripts run). Both of the latter put the
            global view, the whole image as one tile, first.
        max_tiles: local tiles at most.
    """

    mode: str = "none"
    max_tiles: int = 4

    def __post_init__(self) -> None:
        one_of("tiling.mode", self.mode, TILINGS)
        positive("tiling.max_tiles", self.max_tiles)
        if self.mode == "square" and math.isqrt(self.max_tiles) ** 2 != self.max_tiles:
            raise ConfigError(f"tiling.max_tiles: {self.max_tiles} is no square number; tiling.mode square needs one")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tiles an image can have, the global view included, ascending."""
        if self.mode == "none":
            return (1,)
        if self.mode == "square":
            return (1 + self.max_tiles,)
        return tuple(range(2, self.max_tiles + 2))


@dataclass(frozen=True)
class ReducerConfig:
    """Which visual tokens skip, and what happens to them between the connector and the language model.

    Attributes:
        split: which tokens are local and skip. ``finest``: the connector's finest level (CoS). ``saliency``: all
            but the ``retain`` most salient ones (LLaVA). ``tiles``: all tiles but the global view (LLaVA-HD). ``none``:
            nothing, every token is ``RETAINED`` (the dense arrangement); the fields below stay at their off values.
        retain: with ``saliency``: tokens that are retained, in raster order.
        retain_by: what saliency is: ``attention`` of the class token, summed over the heads of the block whose output
            is read (the released code), or ``similarity``, its cosine with the patch (the paper's text).
        local_keep: merge the local tokens down to this many (Skip-Vision, Sec. 4.1); None merges nothing.
        merge_order: of merged tokens: ``similarity``, falling (the released code), or ``raster``.
        merge_rounds: merge in so many rounds, each by the same factor; 1 is the paper's one-shot merge.
        merge_weighted: with several rounds: every original token counts the same in a mean, as in ToMe; without it
            every token of a round does. One round is the same either way.
        summary: ``both``, ``former``, ``latter`` or ``none``: the adaptive summary tokens (Eq. 6) before and after the
            skipped tokens.
        former_over: what the former summarises: ``middle`` (the connector's second finest level, as the released code
            does for CoS), ``retained`` (every retained token, as the paper says) or ``skipped``.
        latter_over: what the latter summarises: ``skipped`` (merged ones, the last local one included), ``retained``
            or ``middle``.
        summary_layers: ``shared``: one scorer for both summary tokens (the released code); ``separate``: two.
        last_local_ffn: the last skipped token runs the FFN and stays in the cache: it is laid out as ``RETAINED``.
        registers: so many learned tokens stand behind every image, for Victor. They are trained with the model; another
            number needs training anew. They may stand behind the dense arrangement too.
    """

    split: str = "finest"
    retain: int | None = None
    retain_by: str = "attention"
    local_keep: int | None = 256
    merge_order: str = "similarity"
    merge_rounds: int = 1
    merge_weighted: bool = True
    summary: str = "both"
    former_over: str = "middle"
    latter_over: str = "skipped"
    summary_layers: str = "shared"
    last_local_ffn: bool = True
    registers: int = 0

    def __post_init__(self) -> None:
        one_of("reducer.split", self.split, SPLITS)
        one_of("reducer.retain_by", self.retain_by, ("attention", "similarity"))
        one_of("reducer.merge_order", self.merge_order, ("similarity", "raster"))
        one_of("reducer.summary", self.summary, SUMMARIES)
        one_of("reducer.former_over", self.former_over, SUMMARISED)
        one_of("reducer.latter_over", self.latter_over, SUMMARISED)
        one_of("reducer.summary_layers", self.summary_layers, ("shared", "separate"))
        positive("reducer.merge_rounds", self.merge_rounds)
        if self.split == "none" and (self.local_keep is not None or self.summary != "none" or self.last_local_ffn):
            raise ConfigError(
                "reducer.split: none leaves no skipped tokens, so local_keep must be null, summary none and "
                "last_local_ffn false"
            )
        if (self.split == "saliency") != (self.retain is not None):
            raise ConfigError(f"reducer.retain: {self.retain} with reducer.split {self.split}; saliency alone needs it")
        if self.local_keep is not None and self.local_keep < 1:
            raise ConfigError(f"reducer.local_keep: {self.local_keep} is out of range; use 1 or more, or null")
        if self.registers < 0:
            raise ConfigError(f"reducer.registers: {self.registers} is out of range; use 0 or more")

    @classmethod
    def off(cls) -> ReducerConfig:
        """The dense arrangement: no skipping, no merging, no summary tokens, no registers."""
        return cls(split="none", local_keep=None, summary="none", last_local_ffn=False)

    @property
    def has_former(self) -> bool:
        """True if a summary token stands before the skipped tokens."""
        return self.summary in ("both", "former")

    @property
    def has_latter(self) -> bool:
        """True if a summary token stands after the skipped tokens."""
        return self.summary in ("both", "latter")

    def merged(self, local: int) -> int:
        """How many of ``local`` local tokens are left after merging."""
        return local if self.local_keep is None else min(local, self.local_keep)


T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any] | T, where: str) -> T:
    """Make settings of a mapping; what is settings already is returned.

    Raises:
        ConfigError: unknown keys, with the known ones; or values that contradict each other.
    """
    if isinstance(values, kind):
        return values
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):  # type: ignore[arg-type]
        raise ConfigError(f"{where}: unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**values)  # type: ignore[arg-type]
