"""Compound scaling: carry a pretrained resampler to more windows and more levels (Chain-of-Sight, arXiv 2407.15819)."""

from __future__ import annotations

from torch import Tensor

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.configuration import ConnectorConfig

LEVELS = "levels."


def scale_resampler(
    state: dict[str, Tensor], old: ConnectorConfig, old_grid: int, new: ConnectorConfig, new_grid: int
) -> dict[str, Tensor]:
    """Weights for a resampler of another shape, computed from a pretrained one's.

    Level 0 comes from level 0. Every finer level comes from the old finest one, unless both resamplers have equally
    many levels whose windows hold equally many queries: then each level comes from its own. A level's queries are
    repeated on the grid of windows by nearest neighbour along both axes, so that a new window starts from the queries
    of the old window at its place; all other weights are copied as they are. 80 tokens (windows 16 and 4 of a 16 x 16
    grid) become 1296 (windows 32, 4 and 2 of a 32 x 32 grid) with queries x1, x4 and x16.

    Args:
        state: the state dict of a ``MultiScaleResampler`` built from ``old`` and ``old_grid``.
        old: the connector the weights were trained with.
        old_grid: its patches per side.
        new: the connector the weights are for.
        new_grid: its patches per side.

    Returns:
        a state dict for ``MultiScaleResampler(new, new_grid, ...)`` of the same widths and number of depths. Tensors
        that needed no repeating are those of ``state``, not copies; the levels that share a source share them.

    Raises:
        ConfigError: a level cannot be mapped (named, with both numbers), or ``head_dim`` differs.
        CheckpointError: ``state`` lacks a level's queries or has another number of them than ``old``.
    """
    old.check_grid(old_grid)
    new.check_grid(new_grid)
    if old.head_dim != new.head_dim:
        raise ConfigError(f"connector.head_dim: {new.head_dim}, but the weights were trained with {old.head_dim}")
    scaled = {name: tensor for name, tensor in state.items() if not name.startswith(LEVELS)}
    for level, source in enumerate(_sources(old, old_grid, new, new_grid)):
        before, after = f"{LEVELS}{source}.", f"{LEVELS}{level}."
        part = {name.removeprefix(before): t for name, t in state.items() if name.startswith(before)}
        found = part["queries"].shape[0] if "queries" in part else 0
        if found != old.queries[source]:
            raise CheckpointError(
                f"{before}queries: found {found} queries, connector.queries has {old.queries[source]}"
            )
        _check_level(level, source, old, old_grid, new, new_grid)
        sides = old_grid // old.windows[source], new_grid // new.windows[level]
        scaled.update({after + name: tensor for name, tensor in part.items()})
        scaled[after + "queries"] = repeat_queries(part["queries"], *sides)
    return scaled


def repeat_queries(queries: Tensor, old_side: int, new_side: int) -> Tensor:
    """Repeat each window's queries on a finer grid of windows, nearest neighbour along both axes.

    Args:
        queries: (old_side^2 * m, W), windows in raster order, then a window's m queries.
        old_side: windows per side.
        new_side: windows per side afterwards, a multiple of ``old_side``.

    Returns:
        (new_side^2 * m, W) in the same order; ``queries`` itself if the sides are equal.
    """
    if old_side == new_side:
        return queries
    factor, width = new_side // old_side, queries.shape[-1]
    windows = queries.view(old_side, old_side, -1, width)
    return windows.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1).reshape(-1, width)


def _per_window(connector: ConnectorConfig, grid: int, level: int) -> int:
    """Queries of one window of a level."""
    return connector.queries[level] // (grid // connector.windows[level]) ** 2


def _sources(old: ConnectorConfig, old_grid: int, new: ConnectorConfig, new_grid: int) -> list[int]:
    """For every new level, the old level its weights come from."""
    levels, finest = range(len(new.windows)), len(old.windows) - 1
    if len(new.windows) == len(old.windows) and all(
        _per_window(old, old_grid, level) == _per_window(new, new_grid, level) for level in levels
    ):
        return list(levels)
    return [0 if level == 0 else finest for level in levels]


def _check_level(
    level: int, source: int, old: ConnectorConfig, old_grid: int, new: ConnectorConfig, new_grid: int
) -> None:
    """Raise ConfigError if the queries of ``source`` cannot be repeated onto the windows of ``level``."""
    had, needs = _per_window(old, old_grid, source), _per_window(new, new_grid, level)
    if had != needs:
        raise ConfigError(
            f"connector.queries[{level}]: {needs} queries per window, but level {source} of the weights has {had}"
        )
    old_side, new_side = old_grid // old.windows[source], new_grid // new.windows[level]
    if new_side % old_side:
        raise ConfigError(
            f"connector.windows[{level}]: {new_side} x {new_side} windows are no multiple of the "
            f"{old_side} x {old_side} windows of level {source} of the weights"
        )
