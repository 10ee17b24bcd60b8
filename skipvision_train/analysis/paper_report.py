"""What an analysis leaves behind: tables on the terminal, pictures, and one JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from skipvision_train.analysis import attention_figures, paper_figures
from skipvision_train.analysis.attention_figures import ImageSpan
from skipvision_train.analysis.attention_maps import AttentionMaps
from skipvision_train.analysis.bounds import ErrorBound
from skipvision_train.analysis.ffn_impact import FfnImpact, FlopsShare
from skipvision_train.analysis.panels import runs
from skipvision_train.analysis.similarity import LevelSimilarity

SHOWN_LAYERS = 4
"""How many layers the picture of single heads shows."""


@dataclass
class Analysis:
    """The parts of one analysis; None where a part was not asked for.

    Attributes:
        geometry: whose FLOPs were counted.
        names: what a kind is called, where not by its name: in others' models all visual tokens are ``skipped``.
    """

    geometry: str = ""
    names: dict[str, str] = field(default_factory=dict)
    flops: list[FlopsShare] | None = None
    ffn: FfnImpact | None = None
    similarity: list[LevelSimilarity] | None = None
    attention: AttentionMaps | None = None
    bound: ErrorBound | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, part by part."""
        parts: dict[str, Any] = {}
        if self.flops is not None:
            parts["flops"] = {"geometry": self.geometry, "shares": [asdict(share) for share in self.flops]}
        if self.ffn is not None:
            parts["ffn"] = self.ffn.to_dict()
        if self.similarity is not None:
            parts["similarity"] = [level.to_dict() for level in self.similarity]
        if self.attention is not None:
            parts["attention"] = self.attention.to_dict()
        if self.bound is not None:
            parts["bound"] = self.bound.to_dict()
        return parts

    def tables(self) -> str:
        """The parts as text, a short table each."""
        parts = []
        if self.flops is not None:
            parts.append(_flops_table(self.geometry, self.flops))
        if self.ffn is not None:
            parts.append(_ffn_table(self.ffn, self.names))
        if self.similarity is not None:
            parts.append(_similarity_table(self.similarity))
        if self.attention is not None:
            parts.append(_attention_table(self.attention, self.names))
        if self.bound is not None:
            parts.append(_bound_table(self.bound))
        return "\n\n".join(parts)

    def figures(self) -> dict[str, Figure]:
        """The pictures by file name."""
        found: dict[str, Figure] = {}
        if self.flops is not None:
            shares = {name: [getattr(share, name) for share in self.flops] for name in paper_figures.SHARES}
            tokens = [share.visual_tokens for share in self.flops]
            found["flops_share"] = paper_figures.flops_share(
                tokens, shares, title=f"FLOPs of the decoder, {self.geometry}"
            )
        if self.ffn is not None:
            estimates = {kind.name.lower(): estimate for kind, estimate in self.ffn.estimates().items()}
            means = {kind: estimate.mean.tolist() for kind, estimate in estimates.items()}
            bounds = {kind: torch.stack([own.low, own.high], -1).tolist() for kind, own in estimates.items()}
            title = f"FFN impact, plan {self.ffn.plan}"
            found["ffn_impact"] = paper_figures.ffn_impact(means, bounds, self.names, title=title)
        if levels := [level for level in self.similarity or [] if len(level.values)]:
            found["similarity"] = paper_figures.similarity_density(
                {f"{level.name} ({level.tokens:.4g} tokens)": level.values.tolist() for level in levels},
                {f"{level.name} ({level.tokens:.4g} tokens)": float(level.estimate().mean) for level in levels},
            )
        if self.attention is not None:
            found |= _attention_figures(self.attention, self.names)
        if self.bound is not None:
            found["error_bound"] = _bound_figure(self.bound)
        return found


def _attention_figures(maps: AttentionMaps, names: Mapping[str, str]) -> dict[str, Figure]:
    """The mass over all samples; the maps of the one that has generated most (of equal ones the first)."""
    trace = max(maps.traces, key=lambda own: len(own.tokens))
    part = trace.image_span()
    kinds = trace.to_dict()["kinds"]
    span = ImageSpan(kinds, part.start, names)
    mass = {kind: estimate.mean.tolist() for kind, estimate in maps.mass().items()}
    found = {
        "attention_mass": paper_figures.attention_mass(mass, names),
        "attention_map": attention_figures.attention_map(
            trace.mean.mean(0)[:, part].tolist(),
            span,
            title=f"Attention of generated tokens, sample {trace.sample[-40:]}",
        ),
    }
    if trace.heads:
        layers, heads = spread_layers(trace.mean.shape[1]), list(trace.heads)
        panels = [[trace.heads[head][:, layer, part].tolist() for head in heads] for layer in layers]
        found["attention_heads"] = attention_figures.attention_heads(panels, layers, heads, trace.tokens, span)
    return found


def spread_layers(depth: int) -> list[int]:
    """At most ``SHOWN_LAYERS`` layers, evenly from the first to the last."""
    count = min(SHOWN_LAYERS, depth)
    return sorted({round(i * (depth - 1) / max(1, count - 1)) for i in range(count)})


def _bound_figure(bound: ErrorBound) -> Figure:
    def mean(name: str) -> list[float]:
        return bound.stacked(name).mean(0).tolist()

    bounds = {
        "bound (Eq. 10)": bound.telescoped().mean(0).tolist(),
        "with residuals": bound.telescoped(residual=True).mean(0).tolist(),
    }
    measured = {
        "measured, all tokens": mean("whole"),
        "measured, text": mean("text"),
        "measured, last token": mean("read"),
        "skipping error": mean("skipping"),
    }
    constants = {
        "L attention": [norms.attention for norms in bound.norms],
        "L FFN": [norms.ffn for norms in bound.norms],
    }
    title = f"Error of skipped FFNs, plan {bound.plan}"
    return paper_figures.error_bound(bounds, bound.log_errors().mean(0).tolist(), measured, constants, title=title)


# --- tables --------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest entry, aligned at the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]


def _flops_table(geometry: str, shares: Sequence[FlopsShare]) -> str:
    header = ("visual tokens", "TFLOPs", *paper_figures.SHARE_NAMES)
    rows = [
        (
            f"{share.visual_tokens:g}",
            f"{share.flops / 1e12:.4g}",
            *(f"{100 * getattr(share, name):.1f} %" for name in paper_figures.SHARES),
        )
        for share in shares
    ]
    return "\n".join([f"FLOPs of the decoder, {geometry} (Figure 2)", *_table(header, rows)])


def _by_layer(columns: Mapping[str, Tensor], form: str) -> list[str]:
    """A line per layer, a column per entry of (L,) values."""
    depth = len(next(iter(columns.values())))
    rows = [
        [str(layer), *(format(float(column[layer]), form) for column in columns.values())] for layer in range(depth)
    ]
    return _table(["layer", *columns], rows)


def _ffn_table(impact: FfnImpact, names: Mapping[str, str]) -> str:
    columns = {names.get(k.name.lower(), k.name.lower()): own.mean for k, own in impact.estimates().items()}
    return "\n".join([f"FFN impact ||FFN(h)|| / ||h||, plan {impact.plan} (Figure 3)", *_by_layer(columns, ".3f")])


def _similarity_table(levels: Sequence[LevelSimilarity]) -> str:
    rows = []
    for level in levels:
        found = level.estimate()
        interval = f"{float(found.low):.3f} to {float(found.high):.3f}" if len(level.values) else "n/a"
        mean = f"{float(found.mean):.3f}" if len(level.values) else "n/a"
        rows.append((level.name, f"{level.tokens:.4g}", mean, interval))
    lines = _table(("level", "tokens", "mean similarity", "95 % interval"), rows)
    return "\n".join(["similarity of visual tokens (Figure 5)", *lines])


def _attention_table(maps: AttentionMaps, names: Mapping[str, str]) -> str:
    columns = {names.get(kind, kind): 100 * estimate.mean for kind, estimate in maps.mass().items()}
    how = "with" if maps.evicted else "without"
    title = f"attention of generated tokens in %, plan {maps.plan}, {how} eviction (Figures 7, 8)"
    return "\n".join([title, *_by_layer(columns, ".1f")])


def _bound_table(bound: ErrorBound) -> str:
    columns = {
        "L attention": torch.tensor([norms.attention for norms in bound.norms]),
        "L FFN": torch.tensor([norms.ffn for norms in bound.norms]),
        "skipping error": bound.stacked("skipping").mean(0),
        "error, all tokens": bound.stacked("whole").mean(0),
        "error, text": bound.stacked("text").mean(0),
        "error, last token": bound.stacked("read").mean(0),
    }
    logs = {
        "log10 error": bound.log_errors().mean(0),
        "log10 bound": bound.telescoped().mean(0),
        "with residuals": bound.telescoped(residual=True).mean(0),
    }
    lines = [
        f"{line}{rest}"
        for line, rest in zip(
            _by_layer(columns, ".3g"),
            (row[5:] for row in _by_layer(logs, ".2f")),  # without its layer
            strict=True,
        )
    ]
    found = bound.kl_bounds()
    measured = sum(sample.kl for sample in bound.samples) / len(bound.samples)
    small = sum(1 for norms in bound.norms if norms.paper < 1)
    return "\n".join(
        [
            f"error of skipped FFNs, plan {bound.plan} (Sec. 5); log10: of the error of all tokens and its bounds",
            *lines,
            f"measured above Eq. 10 in {_exceeded(bound)}; above the bound with residuals in "
            f"{_exceeded(bound, residual=True)}",
            f"closed form (Eq. 11): 10^{_mean(bound.closed()):.2f}; L attention + L FFN is below 1 in {small} of "
            f"{len(bound.norms)} layers",
            f"KL(p_skip || p_dense): measured {measured:.3g} nats, 10^{_log10(measured):.2f}; bound (Eq. 12) "
            f"10^{_mean(found['bound']):.2f}, exceeded in {bound.kl_violations()} of {len(bound.samples)} samples",
            f"Eq. 12 with the last token's measured error: 10^{_mean(found['measured']):.2f} nats",
        ]
    )


def _exceeded(bound: ErrorBound, residual: bool = False) -> str:
    """In how many samples the measured error is above the bound, and behind which layers in any of them."""
    layers = bound.exceeded(residual).any(0).nonzero()[:, 0].tolist()
    spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs(layers))
    count = f"{bound.violations(residual)} of {len(bound.samples)} samples"
    return f"{count}, layers {spans}" if layers else count


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _mean(values: Sequence[float] | Tensor) -> float:
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else -math.inf
