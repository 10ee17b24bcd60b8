"""What a check found, as figures, as a verdict, and as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.check import Measure, Tally
from skipvision_train.data.dataset import BYTES_PER_TOKEN
from skipvision_train.data.mixture import Part

Values = Counter[int]
"""How often each value occurs."""

_BARS = "▁▂▃▄▅▆▇█"
_FEW = 6
"""So many different values are listed one by one instead of being drawn."""


@dataclass(frozen=True)
class Cost:
    """What an epoch takes.

    Attributes:
        flops: of all forward and backward passes.
        peak_tflops: of one GPU.
        mfu: share of it that is reached.
        backward: FLOPs of a backward pass over those of a forward pass.
    """

    flops: float
    peak_tflops: float
    mfu: float
    backward: float

    @property
    def gpu_hours(self) -> float:
        """Of one epoch."""
        return self.flops / (self.peak_tflops * 1e12 * self.mfu) / 3600


def token_shapes(tally: Tally, measure: Measure) -> Counter[tuple[int, tuple[int, ...]]]:
    """``Tally.shapes`` with text in tokens: from bytes where there is no tokenizer, cut at ``max_length``."""
    if measure.tokenizer is not None:
        return tally.shapes
    shapes: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for (text, tiles), count in tally.shapes.items():
        tokens = text // BYTES_PER_TOKEN
        if measure.config is not None and measure.max_length is not None:
            tokens = min(tokens, measure.max_length - measure.visual(tiles))
        shapes[tokens, tiles] += count
    return shapes


def histogram(values: Values) -> dict[str, Any]:
    """Counts of values in bins whose bounds grow by the square root of two: ``edges[i] <= value < edges[i + 1]``."""
    if not values:
        return {"edges": [], "counts": []}
    edges = [0, 1]
    step = 0
    while edges[-1] <= max(values):
        step += 1
        if (edge := round(2 ** (step / 2))) > edges[-1]:
            edges.append(edge)
    counts, _ = np.histogram(list(values), bins=edges, weights=list(values.values()))
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    return {"edges": edges[first : last + 2], "counts": [int(count) for count in counts[first : last + 1]]}


def quantile(values: Values, share: float) -> int:
    """The smallest value that at least this share of all values does not exceed; 0 of no values."""
    wanted, seen = share * values.total(), 0
    for value in sorted(values):
        seen += values[value]
        if seen >= wanted:
            return value
    return 0


def distribution(values: Values) -> dict[str, Any]:
    """A histogram with what it does not show exactly; ``values`` lists a few different ones, and else is null."""
    total = sum(value * count for value, count in values.items())
    return {
        "least": min(values, default=0),
        "median": quantile(values, 0.5),
        "p99": quantile(values, 0.99),
        "most": max(values, default=0),
        "mean": total / values.total() if values else 0.0,
        "values": {str(value): values[value] for value in sorted(values)} if len(values) <= _FEW else None,
    } | histogram(values)


def duplicates(tallies: Sequence[Tally], names: Sequence[str], pixels: bool) -> dict[str, Any]:
    """Images that are there more than once, among those that can be decoded.

    Returns:
        Per source (``within``) and in ``all``: ``images``, distinct ``places`` (files, or slots of rows), distinct
        ``contents`` (bytes), and ``duplicates``, places whose bytes an earlier place has; ``pixel_contents`` are
        distinct pixels, where they were hashed. ``across``: contents that two sources share.
    """
    width = 3 if pixels else 2
    tables = [np.frombuffer(tally.digests, dtype=np.uint64).reshape(-1, width) for tally in tallies]
    within = {name: _within(table) for name, table in zip(names, tables, strict=True)}
    contents = [np.unique(table[:, 0]) for table in tables]
    across = {
        f"{names[a]} + {names[b]}": shared
        for a, b in combinations(range(len(tables)), 2)
        if (shared := len(np.intersect1d(contents[a], contents[b], assume_unique=True)))
    }
    return {"all": _within(np.concatenate(tables)), "within": within, "across": across}


def _within(table: NDArray[np.uint64]) -> dict[str, int]:
    contents = len(np.unique(table[:, 0]))
    # A place and its content are one number here: a file does not change while it is read.
    places = len(np.unique(table[:, 0] ^ (table[:, 1] * np.uint64(0x9E3779B97F4A7C15))))
    found = {"images": len(table), "places": places, "contents": contents, "duplicates": places - contents}
    return found | ({"pixel_contents": len(np.unique(table[:, 2]))} if table.shape[1] == 3 else {})


def budgets(parts: Sequence[Part], tallies: Sequence[Tally], error_budget: int) -> list[str]:
    """What is over its budget, as a run counts: a source with ``max_malformed`` by itself, all others together.

    Args:
        parts: the recipe's sources.
        tallies: what was found in them.
        error_budget: of the sources without ``max_malformed``.
    """
    over, shared, common = [], 0, []
    for part, tally in zip(parts, tallies, strict=True):
        allowed, found = part.source.max_malformed, tally.bad_occurrences
        if allowed is None:
            shared += found
            common += [f"{part.source.name} {found:,}"] if found else []
        elif found > allowed:
            over.append(f"{part.source.name}: {found:,} unusable records, max_malformed is {allowed:,}")
    if shared > error_budget:
        over.append(f"{shared:,} unusable records ({', '.join(common)}), error_budget is {error_budget:,}")
    return over


def figures(part: Part, tally: Tally, measure: Measure, cost: Cost | None) -> dict[str, Any]:
    """What was found in one source, as plain data for ``check.json``."""
    shapes = token_shapes(tally, measure)
    lengths, visual = Counter[int](), Counter[int]()
    for (text, tiles), count in shapes.items():
        tokens = measure.visual(tiles)
        lengths[text + tokens] += count
        visual[tokens] += count
    found = {
        "name": part.source.name,
        "format": part.source.format,
        "in_files": len(part.store),
        "records": tally.records,
        "epoch": tally.occurrences,
        "hash": part.hash,
        "max_malformed": part.source.max_malformed,
        "bad": tally.reasons.total(),
        "bad_in_epoch": tally.bad_occurrences,
        "reasons": dict(sorted(tally.reasons.items())),
        "text_only": tally.text_only,
        "images": {
            "listed": tally.images,
            "found": tally.images - tally.missing,
            "missing": tally.missing,
            "broken": tally.broken,
            "refused": tally.refused,
            "wrong_extension": tally.misnamed,
            "longer_side": distribution(tally.sides),
        },
        "text_bytes": tally.text_bytes,
        "tokens": sum(length * count for length, count in lengths.items()),
        "visual_tokens": sum(value * count for value, count in visual.items()),
        "length": distribution(lengths),
        "visual": distribution(visual),
    }
    if measure.tokenizer is not None:
        found["supervised_tokens"] = tally.supervised
    if cost is not None:
        found |= {"flops": cost.flops, "gpu_hours": cost.gpu_hours}
    return found


def as_text(check: Mapping[str, Any]) -> str:
    """The content of ``check.json`` for a terminal."""
    blocks = [
        _block(source, check["exact"], check["images_measured"], check["duplicates"]["within"][source["name"]])
        for source in check["sources"]
    ]
    return "\n\n".join([*blocks, _totals(check)])


def _block(source: Mapping[str, Any], exact: bool, model: bool, twice: Mapping[str, int]) -> str:
    images, about = source["images"], "" if exact else "about "
    unit = ("tokens" if model else "tokens of text") + ("" if exact else " (estimated)")
    lines = {
        "records": f"{source['records']:,} read of {source['in_files']:,} in its files, {source['epoch']:,} in an "
        f"epoch, {source['text_only']:,} text-only",
        "images": f"{images['listed']:,} listed, {images['found']:,} found, {images['missing']:,} missing, "
        f"{images['broken']:,} broken, {images['refused']:,} refused, {images['wrong_extension']:,} with the extension "
        "of another format",
        "duplicates": _twice(twice),
        "unusable": _unusable(source),
        "length": bars(source["length"], unit),
        "visual": bars(source["visual"], "tokens") if model else "",
        "image side": bars(images["longer_side"], "pixels, the longer one") if twice["images"] else "",
        "in all": f"{about}{source['tokens']:,} tokens in an epoch" + _hours(source),
    }
    return "\n".join([source["name"], *(f"  {name:<11}{line}" for name, line in lines.items() if line)])


def _unusable(source: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in source["reasons"].items())
    allowed = "" if source["max_malformed"] is None else f" (max_malformed {source['max_malformed']:,})"
    return f"{source['bad']:,} records{allowed}" + (f": {reasons}" if reasons else "")


def _twice(found: Mapping[str, int]) -> str:
    pixels = f"; {found['pixel_contents']:,} different pictures" if "pixel_contents" in found else ""
    return f"{found['duplicates']:,} of {found['places']:,} images have the bytes of another{pixels}"


def _hours(found: Mapping[str, Any]) -> str:
    return f", {found['gpu_hours']:,.3g} GPU hours" if "gpu_hours" in found else ""


def _totals(check: Mapping[str, Any]) -> str:
    total, twice = check["total"], check["duplicates"]
    tokens = f"{total['tokens']:,} tokens" + ("" if check["exact"] else " (estimated)")
    if check["images_measured"]:
        tokens += f", {total['visual_tokens']:,} of them visual"
    lines = [
        f"{check['recipe']}: {total['epoch']:,} records in an epoch, {total['bad']:,} unusable, "
        f"{tokens}{_hours(total)}",
        f"duplicates: {_twice(twice['all'])}",
        *(f"  {names}: {count:,} images in both" for names, count in _most(twice["across"])),
        *check["notes"],
    ]
    return "\n".join(lines)


def _most(across: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(across.items(), key=lambda pair: -pair[1])[:10]


def bars(values: Mapping[str, Any], unit: str) -> str:
    """A distribution on one line: few values as a list, more as bars between the least and the most."""
    if not values["counts"]:
        return "none"
    if listed := values["values"]:
        total = sum(listed.values())
        shares = [f"{int(value):,} ({100 * count / total:.3g} %)" for value, count in listed.items()]
        return f"{', '.join(shares)} {unit}"
    highest = max(values["counts"])
    drawn = "".join(" " if not n else _BARS[-(-n * len(_BARS) // highest) - 1] for n in values["counts"])
    return (
        f"{values['least']:,} {drawn} {values['most']:,} {unit}; median {values['median']:,}, "
        f"mean {values['mean']:,.4g}, 99 % up to {values['p99']:,}"
    )
