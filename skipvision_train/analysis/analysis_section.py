"""What the report shows of ``skipvision analyze``: its figures, drawn again from ``analysis.json`` for both themes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from skipvision_train.analysis import attention_figures, paper_figures
from skipvision_train.analysis.attention_figures import ImageSpan
from skipvision_train.analysis.figures import embed
from skipvision_train.errors import DataError
from skipvision_train.files import read_json

PARTS = ("flops", "ffn", "similarity", "attention", "bound")
_PER_SAMPLE = 2000
"""Values that stand for a histogram, where a density is drawn from it."""


class Card(NamedTuple):
    """A figure: caption, alternative text, what draws it from which data, its title."""

    caption: str
    alt: str
    draw: Callable[..., Figure]
    data: tuple[Any, ...]
    title: str


def read_analysis(path: str | Path) -> dict[str, Any]:
    """``analysis.json``, or that of a folder.

    Raises:
        DataError: the file is missing or holds something else; the message names it.
    """
    path = Path(path) / "analysis.json" if Path(path).is_dir() else Path(path)
    data = read_json(path)
    if not isinstance(data, dict) or not any(part in data for part in PARTS):
        raise DataError(f"{path}: not what skipvision analyze writes: none of {', '.join(PARTS)} is there")
    try:
        analysis_cards(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: not what skipvision analyze writes: {type(error).__name__}: {error}") from error
    return data


def analysis_cards(data: Mapping[str, Any]) -> list[Card]:
    """The figures of the parts that are there."""
    cards: list[Card] = []
    names = _kind_names(data)
    if "flops" in data:
        shares = data["flops"]["shares"]
        columns = {name: [share[name] for share in shares] for name in paper_figures.SHARES}
        title = f"FLOPs of the decoder, {data['flops']['geometry']}"
        given = ([share["visual_tokens"] for share in shares], columns)
        cards.append(Card("As an image has more tokens.", "Shares of FLOPs", paper_figures.flops_share, given, title))
    if "ffn" in data:
        impact = data["ffn"]["impact"]
        means = {kind: _known(own["mean"]) for kind, own in impact.items()}
        bounds = {k: list(zip(_known(own["low"]), _known(own["high"]), strict=True)) for k, own in impact.items()}
        caption = "How much the FFN changes a token: its update over what it is added to. Bands: 95 % intervals."
        title = f"FFN impact, plan {data['ffn']['plan']}"
        cards.append(Card(caption, "FFN impact per layer", paper_figures.ffn_impact, (means, bounds, names), title))
    if levels := [own for own in data.get("similarity", []) if sum(own["histogram"])]:
        values = {_level(own): _values(own["histogram"]) for own in levels}
        means_by_level = {_level(own): own["mean"] for own in levels}
        caption = "Of a token to the others of its level; dashed: means."
        title = "Similarity of visual tokens"
        cards.append(Card(caption, title, paper_figures.similarity_density, (values, means_by_level), title))
    if "attention" in data:
        cards += _attention(data["attention"], names)
    if "bound" in data:
        cards.append(_bound(data["bound"]))
    return cards


def analysis_section(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of an analysis: ``name`` and ``figures``."""
    figures = [
        {**embed(alt, draw, *given, title=title), "caption": caption}
        for caption, alt, draw, given, title in analysis_cards(data)
    ]
    return {"name": name, "figures": figures}


def _kind_names(data: Mapping[str, Any]) -> dict[str, str]:
    """In others' models all visual tokens are of the kind ``skipped``: they are called visual."""
    kinds = set(data.get("ffn", {}).get("impact", {})) | set(data.get("attention", {}).get("mass", {}))
    return {"skipped": "visual"} if "skipped" in kinds and not kinds & {"retained", "middle", "summary"} else {}


def _level(own: Mapping[str, Any]) -> str:
    return f"{own['level']} ({own['tokens']:.4g} tokens)"


def _values(histogram: list[int]) -> list[float]:
    """Values that fall into the bins as the histogram says, at most ``_PER_SAMPLE`` of them."""
    total = sum(histogram)
    bins = len(histogram)
    values: list[float] = []
    for place, count in enumerate(histogram):
        centre = -1 + (2 * place + 1) / bins
        values += [centre] * (count if total <= _PER_SAMPLE else round(count * _PER_SAMPLE / total))
    return values


def _attention(attention: Mapping[str, Any], names: Mapping[str, str]) -> list[Card]:
    mass = {kind: _known(own["mean"]) for kind, own in attention["mass"].items()}
    how = "with" if attention["evicted"] else "without"
    caption = f"Where generated tokens look, {how} eviction from the cache; plan {attention['plan']}."
    title = "Attention of generated tokens"
    cards: list[Card] = [
        Card(caption, "Attention mass per layer and kind", paper_figures.attention_mass, (mass, names), title)
    ]
    trace = max(attention["samples"], key=lambda own: len(own["generated"]))
    span = ImageSpan(trace["kinds"], trace["first_position"], names)
    caption = f"Of the sample {trace['sample'][-40:]}, mean over heads and generated tokens."
    cards.append(Card(caption, "Attention map", attention_figures.attention_map, (trace["rows"], span), title))
    return cards


def _bound(bound: Mapping[str, Any]) -> Card:
    measured = bound["measured"]
    bounds = {
        "bound (Eq. 10)": _finite(bound["log10_bound"]),
        "with residuals": _finite(bound["log10_bound_residual"]),
    }
    lines = {
        "measured, all tokens": measured["whole"]["mean"],
        "measured, text": measured["text"]["mean"],
        "measured, last token": measured["read"]["mean"],
        "skipping error": measured["skipping"]["mean"],
    }
    constants = {
        "L attention": [layer["attention"] for layer in bound["layers"]],
        "L FFN": [layer["ffn"] for layer in bound["layers"]],
    }
    caption = f"What skipping FFNs changes, and the paper's bound; measured above it in {bound['violations']} samples."
    given = (bounds, _finite(bound["log10_measured"]), lines, constants)
    title = f"Error of skipped FFNs, plan {bound['plan']}"
    return Card(caption, "Error bound per layer", paper_figures.error_bound, given, title)


def _known(values: list[float | None]) -> list[float]:
    """null stands where a layer has no token of the kind."""
    return [float("nan") if value is None else value for value in values]


def _finite(values: list[float | None]) -> list[float]:
    """JSON has no infinity: null stands for the logarithm of 0."""
    return [-float("inf") if value is None else value for value in values]
