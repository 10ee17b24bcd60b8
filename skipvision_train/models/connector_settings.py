"""Connectors as settings: what each reads off the vision tower, and how many tokens of which level it makes of a tile.

``levels(vision)`` checks the settings against the tower, so that what cannot be built is refused before it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from skipvision_train.errors import ConfigError
from skipvision_train.models.settings import VisionConfig, build, one_of, positive


@dataclass(frozen=True)
class ResamplerConfig:
    """The multi-scale resampler (Chain-of-Sight): one level per window size, coarsest first.

    Attributes:
        windows: window side of each level, in patches, strictly decreasing; each divides the grid.
        queries: learned queries of each level over the whole tile; a multiple of the level's number of windows.
        head_dim: channels per attention head.
        init_std: standard deviation of the weights a fresh resampler starts from. 0.02 suits CLIP's 1,024 channels; a
            narrow tower wants more (0.02 times the root of 1,024 over its width), or the signal starts too small.
    """

    windows: tuple[int, ...] = (32, 4, 2)
    queries: tuple[int, ...] = (16, 256, 1024)
    head_dim: int = 64
    init_std: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "queries", tuple(self.queries))
        if not self.windows or len(self.windows) != len(self.queries):
            raise ConfigError(
                f"connector.queries: {len(self.queries)} levels, but connector.windows has {len(self.windows)}"
            )
        if list(self.windows) != sorted(set(self.windows), reverse=True):
            raise ConfigError(f"connector.windows: {list(self.windows)} must be strictly decreasing")

    def check_grid(self, grid: int) -> None:
        """Refuse a patch grid that the windows do not tile.

        Raises:
            ConfigError: naming the level, the window and the grid.
        """
        for level, (window, queries) in enumerate(zip(self.windows, self.queries, strict=True)):
            if window < 1 or grid % window:
                raise ConfigError(
                    f"connector.windows[{level}]: {window} does not divide the {grid} x {grid} grid of patches; "
                    f"use one of {[w for w in range(1, grid + 1) if grid % w == 0]}"
                )
            count = (grid // window) ** 2
            if queries < 1 or queries % count:
                raise ConfigError(
                    f"connector.queries[{level}]: {queries} is no multiple of the level's {count} windows"
                )

    def levels(self, vision: VisionConfig) -> tuple[int, ...]:
        """Tokens of one tile per level, coarsest first.

        Raises:
            ConfigError: the windows do not tile the grid of patches, or a head size that does not divide the width.
        """
        self.check_grid(vision.grid)
        _head_divides(self.head_dim, vision)
        return self.queries


@dataclass(frozen=True)
class MlpConfig:
    """LLaVA's projector: linear layers with GELU between them; one hidden state of the tower.

    Attributes:
        layers: linear layers; 2 is LLaVA-1.5's ``mlp2x_gelu``.
        pool: each pool x pool cell of the projected grid is averaged into one token; 1 pools nothing. Mean average
            pooling is a baseline of Skip-Vision's Figure 11.
    """

    layers: int = 2
    pool: int = 1

    def __post_init__(self) -> None:
        positive("connector.layers", self.layers)
        positive("connector.pool", self.pool)

    def levels(self, vision: VisionConfig) -> tuple[int, ...]:
        """One level: the patches, or the cells of the pooled grid.

        Raises:
            ConfigError: several depths, or cells that do not divide the grid.
        """
        _one_depth(vision)
        _divides("connector.pool", self.pool, vision)
        return ((vision.grid // self.pool) ** 2,)


@dataclass(frozen=True)
class MqtConfig:
    """MQT-LLaVA: learned queries of which the first m are used, in one cross-attention over one hidden state.

    Attributes:
        queries: learned ones, 256 in the paper.
        keep: m, how many are used unless a batch says otherwise.
        head_dim: channels per attention head.
        elastic: in training every batch draws m from the even numbers up to ``queries`` (its second stage).
    """

    queries: int = 256
    keep: int = 256
    head_dim: int = 64
    elastic: bool = False

    def __post_init__(self) -> None:
        positive("connector.queries", self.queries)
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise ConfigError(f"connector.queries: {self.queries} is no square number; mqt lays them out on a grid")
        if not 1 <= self.keep <= self.queries:
            raise ConfigError(f"connector.keep: {self.keep} of {self.queries} queries; use 1 to {self.queries}")
        if self.elastic and (self.queries < 2 or self.keep != self.queries):
            raise ConfigError(
                f"connector.elastic: true with connector.keep {self.keep} of {self.queries} queries; it draws even "
                "numbers up to all of them, so keep must be all, and at least 2"
            )

    def levels(self, vision: VisionConfig) -> tuple[int, ...]:
        """One level of ``keep`` tokens.

        Raises:
            ConfigError: several depths, or a head size that does not divide the width.
        """
        _one_depth(vision)
        _head_divides(self.head_dim, vision)
        if vision.width % 4:
            raise ConfigError(f"vision.width: {vision.width} is no multiple of 4; mqt's position embedding needs one")
        return (self.keep,)


@dataclass(frozen=True)
class TokenPackerConfig:
    """TokenPacker: the last depth's features, shrunk, query their own cell in the features of all depths.

    Attributes:
        scale: patches per side of a cell; 2, 3 and 4 make 144, 64 and 36 tokens of 24 x 24 patches.
        width: channels of keys, values and queries.
        heads: attention heads.
    """

    scale: int = 2
    width: int = 1024
    heads: int = 8

    def __post_init__(self) -> None:
        positive("connector.scale", self.scale)
        if self.heads < 1 or self.width % self.heads:
            raise ConfigError(f"connector.width: {self.width} is no multiple of connector.heads {self.heads}")

    def levels(self, vision: VisionConfig) -> tuple[int, ...]:
        """One level: the cells.

        Raises:
            ConfigError: cells that do not divide the grid.
        """
        _divides("connector.scale", self.scale, vision)
        return ((vision.grid // self.scale) ** 2,)


@dataclass(frozen=True)
class VisionZipConfig:
    """VisionZip: the tokens that the class token attends to, and merged rest, before LLaVA's projector.

    Attributes:
        dominant: the class token and the ``dominant - 1`` patches with most of its attention.
        contextual: tokens into which the rest is merged.
        layers: linear layers of the projector.
    """

    dominant: int = 54
    contextual: int = 10
    layers: int = 2

    def __post_init__(self) -> None:
        positive("connector.dominant", self.dominant)
        positive("connector.contextual", self.contextual)
        positive("connector.layers", self.layers)

    def levels(self, vision: VisionConfig) -> tuple[int, ...]:
        """One level of dominant and contextual tokens.

        Raises:
            ConfigError: several depths, or more tokens than there are.
        """
        _one_depth(vision)
        patches, total = vision.grid**2, self.dominant + self.contextual
        if total > patches + 1:
            raise ConfigError(
                f"connector.dominant: {self.dominant} and connector.contextual {self.contextual} are more than the "
                f"{patches} patches and the class token"
            )
        return (total,)


ConnectorConfig = ResamplerConfig | MlpConfig | MqtConfig | TokenPackerConfig | VisionZipConfig

CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "resampler": ResamplerConfig,
    "mlp": MlpConfig,
    "mqt": MqtConfig,
    "token_packer": TokenPackerConfig,
    "visionzip": VisionZipConfig,
}
"""``connector.type`` and the settings that it reads."""


def _one_depth(vision: VisionConfig) -> None:
    if len(vision.depths) != 1:
        raise ConfigError(f"vision.depths: {list(vision.depths)}; this connector reads one hidden state, name one")


def _head_divides(head_dim: int, vision: VisionConfig) -> None:
    if head_dim < 1 or vision.width % head_dim:
        raise ConfigError(f"connector.head_dim: {head_dim} does not divide vision.width {vision.width}")


def _divides(path: str, cell: int, vision: VisionConfig) -> None:
    grid = vision.grid
    if cell < 1 or grid % cell:
        raise ConfigError(
            f"{path}: {cell} does not divide the {grid} x {grid} grid of patches; "
            f"use one of {[w for w in range(1, grid + 1) if grid % w == 0]}"
        )


def connector_kind(values: Mapping[str, Any]) -> type[ConnectorConfig]:
    """Which settings a mapping with ``type`` is of; ``resampler`` where it is missing.

    Raises:
        ConfigError: an unknown type.
    """
    name = str(values.get("type", "resampler"))
    one_of("connector.type", name, tuple(CONNECTORS))
    return CONNECTORS[name]


def build_connector_config(values: Mapping[str, Any] | ConnectorConfig) -> ConnectorConfig:
    """Connector settings of a mapping with ``type``.

    Raises:
        ConfigError: an unknown type, or fields that this type does not read.
    """
    if isinstance(values, ConnectorConfig):
        return values
    kind = connector_kind(values)
    rest = {name: value for name, value in values.items() if name != "type"}
    return build(kind, rest, f"connector (type {values.get('type', 'resampler')})")


def connector_dict(config: ConnectorConfig) -> dict[str, Any]:
    """``config`` with its ``type``, as ``config.json`` holds it."""
    name = next(name for name, kind in CONNECTORS.items() if isinstance(config, kind))
    return {"type": name, **asdict(config)}
