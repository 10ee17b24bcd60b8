"""Compound scaling: carry a pretrained resampler to more windows and more levels (Chain-of-Sight, arXiv 2407.15819)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.connector_settings import ResamplerConfig

log = logging.getLogger(__name__)

LEVELS = "levels."


def scale_resampler(
    state: dict[str, Tensor], old: ResamplerConfig, old_grid: int, new: ResamplerConfig, new_grid: int
) -> dict[str, Tensor]:
    """Weights for a resampler of another shape, computed from a pretrained one's.

    A level's weights are those of one old level (:func:`source_levels` says which). Its queries are spread over its
    windows by nearest neighbour along both axes, so that a new window starts from the queries of the old window at its
    place; all other weights are copied as they are. The paper keeps the queries per window. Where their number changes,
    they are repeated or left out evenly in their order, because the queries of a window have no places in it to go by;
    a warning says so, as repeated ones start as equal tokens.

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
        that needed no spreading are those of ``state``, not copies; the levels that share a source share them.

    Raises:
        ConfigError: windows or queries do not fit their grid (named, with both numbers), or ``head_dim`` differs.
        CheckpointError: ``state`` lacks a level's queries or has another number of them than ``old``.
    """
    old.check_grid(old_grid)
    new.check_grid(new_grid)
    if old.head_dim != new.head_dim:
        raise ConfigError(f"connector.head_dim: {new.head_dim}, but the weights were trained with {old.head_dim}")
    scaled = {name: tensor for name, tensor in state.items() if not name.startswith(LEVELS)}
    sides, each = _sides(new, new_grid), _per_window(new, new_grid)
    old_sides, old_each = _sides(old, old_grid), _per_window(old, old_grid)
    for level, source in enumerate(source_levels(old_sides, old_each, sides, each)):
        before, after = f"{LEVELS}{source}.", f"{LEVELS}{level}."
        part = {name.removeprefix(before): t for name, t in state.items() if name.startswith(before)}
        found = part["queries"].shape[0] if "queries" in part else 0
        if found != old.queries[source]:
            raise CheckpointError(
                f"{before}queries: found {found} queries, connector.queries has {old.queries[source]}"
            )
        if each[level] != old_each[source]:
            log.warning(
                "connector.queries[%d]: %d queries per window, which no level of the weights has; they start from the "
                "%d of level %d",
                level, each[level], old_each[source], source,
            )  # fmt: skip
        scaled.update({after + name: tensor for name, tensor in part.items()})
        scaled[after + "queries"] = spread_queries(part["queries"], old_sides[source], sides[level], each[level])
    return scaled


def spread_queries(queries: Tensor, old_side: int, new_side: int, new_each: int) -> Tensor:
    """Give each window of another grid the queries of the old window over whose area its middle lies.

    A middle on the border of two old windows takes the one to the right or below.

    Args:
        queries: (old_side^2 * m, W), windows in raster order, then a window's m queries.
        old_side: windows per side.
        new_side: windows per side afterwards.
        new_each: queries per window afterwards; from m they are taken by nearest neighbour, too, in their order.

    Returns:
        (new_side^2 * new_each, W) in the same order; ``queries`` itself if nothing changes.
    """
    width = queries.shape[-1]
    windows = queries.view(old_side, old_side, -1, width)
    if (old_side, windows.shape[2]) == (new_side, new_each):
        return queries
    place, own = nearest(old_side, new_side), nearest(windows.shape[2], new_each)
    return windows[place][:, place][:, :, own].reshape(-1, width)


def nearest(old: int, new: int) -> Tensor:
    """(new,) int64: of ``old`` equal parts of a line, the one in which the middle of each of ``new`` parts lies.

    A middle on a border counts to the part behind it. The part found covers as much of the new one as any other does.
    Where ``old`` divides ``new``, parts are simply repeated.
    """
    return (2 * torch.arange(new) + 1) * old // (2 * new)


def source_levels(old_sides: list[int], old_each: list[int], sides: list[int], each: list[int]) -> list[int]:
    """For every new level, the old level its weights come from.

    Where both have equally many levels with equally many queries per window, each comes from its own. Elsewhere a level
    comes from one whose windows hold as many queries as its own, or from any if none does. Of these it takes the finest
    whose windows it divides evenly (level 0 takes level 0, if it divides that one's). If there is none, it takes the
    finest that has fewer windows than itself; if all have more, the coarsest.

    Args:
        old_sides: windows per side of every old level, coarsest first.
        old_each: queries of one window of every old level.
        sides, each: the same of the new levels.
    """
    if old_each == each:
        return list(range(len(each)))
    sources = []
    for level, (side, count) in enumerate(zip(sides, each, strict=True)):
        equal = [source for source, had in enumerate(old_each) if had == count] or list(range(len(old_each)))
        even = [source for source in equal if side % old_sides[source] == 0]
        fewer = [source for source in equal if old_sides[source] < side]
        sources.append(0 if level == 0 and 0 in even else (even or fewer or equal[:1])[-1])
    return sources


def _sides(connector: ResamplerConfig, grid: int) -> list[int]:
    """Windows per side of every level."""
    return [grid // window for window in connector.windows]


def _per_window(connector: ResamplerConfig, grid: int) -> list[int]:
    """Queries of one window of every level."""
    return [queries // side**2 for queries, side in zip(connector.queries, _sides(connector, grid), strict=True)]
