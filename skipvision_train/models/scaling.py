"""Compound scaling: carry a pretrained resampler to more windows and more levels (Chain-of-Sight, arXiv 2407.15819)."""

from __future__ import annotations

from torch import Tensor

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.connector_settings import ResamplerConfig

LEVELS = "levels."


def scale_resampler(
    state: dict[str, Tensor], old: ResamplerConfig, old_grid: int, new: ResamplerConfig, new_grid: int
) -> dict[str, Tensor]:
    """Weights for a resampler of another shape, computed from a pretrained one's.

    A level comes from one whose windows hold as many queries as its own: level 0 from level 0 if it can, any other
    from the finest that can. (Where both resamplers have equally many levels with equally many queries per window, each
    comes from its own.) A level's queries are repeated on the grid of windows by nearest neighbour along both axes, so
    that a new window starts from the queries of the old window at its place; all other weights are copied as they are.

    80 tokens (windows 16 and 4 of a 16 x 16 grid, with 16 and 4 queries per window) become, on a 32 x 32 grid, 1296
    (windows 32, 4, 2) from levels 0, 1, 1 with queries x1, x4, x16; or 336 from levels 0, 0, 1 with x1, x4, x4 (windows
    32, 16, 4) or from 0, 1, 1 with x1, x1, x4 (windows 32, 8, 4). These are the correspondences of the released code.

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


def _per_window(connector: ResamplerConfig, grid: int, level: int) -> int:
    """Queries of one window of a level."""
    return connector.queries[level] // (grid // connector.windows[level]) ** 2


def _sources(old: ResamplerConfig, old_grid: int, new: ResamplerConfig, new_grid: int) -> list[int]:
    """For every new level, the old level its weights come from.

    Raises:
        ConfigError: no old level has windows with as many queries, or windows that the new ones divide further.
    """
    had = [_per_window(old, old_grid, level) for level in range(len(old.windows))]
    needs = [_per_window(new, new_grid, level) for level in range(len(new.windows))]
    old_sides, new_sides = _sides(old, old_grid), _sides(new, new_grid)
    if had == needs and all(side % before == 0 for side, before in zip(new_sides, old_sides, strict=True)):
        return list(range(len(had)))
    sources = []
    for level, (queries, side) in enumerate(zip(needs, new_sides, strict=True)):
        equal = [source for source, count in enumerate(had) if count == queries]
        if not equal:
            raise ConfigError(
                f"connector.queries[{level}]: {queries} queries per window, but the levels of the weights have "
                f"{' and '.join(map(str, had))}"
            )
        fits = [source for source in equal if side % old_sides[source] == 0]
        if not fits:
            before = old_sides[equal[-1]]
            raise ConfigError(
                f"connector.windows[{level}]: {side} x {side} windows are no multiple of the {before} x {before} "
                f"windows of level {equal[-1]} of the weights"
            )
        sources.append(0 if level == 0 and 0 in fits else fits[-1])
    return sources


def _sides(connector: ResamplerConfig, grid: int) -> list[int]:
    """Windows per side of every level."""
    return [grid // window for window in connector.windows]
