"""Samples as one HTML page: pictures as data URIs, no script, light and dark as the reader's system.

Everything that comes from data is escaped by the template engine, and characters that would change how the text around
them is shown (control characters, changes of direction) are written by their number.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw

from skipvision_train.analysis.figures import data_uri
from skipvision_train.data.preview import ImageRun, Picture, Sample, SourceSummary, Token
from skipvision_train.plans.rules import TokenKind

TEMPLATE = Path(__file__).with_name("preview_template.html")
LARGEST = 480
"""Longest side of an embedded picture, in pixels."""
SMALLEST = 192
"""Smaller pictures are shown at this size, with their pixels visible."""
PNG_PIXELS = 160 * 160
"""Up to so many pixels a picture is embedded without loss."""

MEANINGS = {
    TokenKind.RETAINED: "visual tokens that run every layer in full",
    TokenKind.MIDDLE: "retained ones of the middle levels",
    TokenKind.SKIPPED: "visual tokens that leave out what the plan says",
    TokenKind.SUMMARY: "summary tokens",
    TokenKind.PAD: "padding",
    TokenKind.TEXT: "tokens of images that count as text",
}

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
_HIDDEN = {code: f"⟨{code:04X}⟩" for code in (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS)}
_IN_TURNS = {code: text for code, text in _HIDDEN.items() if code not in (0x09, 0x0A)}
_IN_CHIPS = _HIDDEN | {0x09: "⇥", 0x0A: "↵"}


@dataclass(frozen=True)
class PreviewInputs:
    """What the page shows.

    Attributes:
        title: its heading.
        facts: name and value of what holds for all samples.
        sources: a line per source.
        samples: of all sources, source by source.
    """

    title: str
    facts: Mapping[str, str]
    sources: Sequence[SourceSummary]
    samples: Sequence[Sample]


def render_preview(inputs: PreviewInputs) -> str:
    """The page as HTML; half a surrogate pair, as in a file's name that is no UTF-8, is written as its number."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    kinds = {kind for sample in inputs.samples for run in _images(sample) for kind, _ in run.runs}
    page = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=shown(inputs.title),
        facts=[(name, shown(value)) for name, value in inputs.facts.items()],
        kinds=[(kind.name.lower(), meaning) for kind, meaning in MEANINGS.items() if kind in kinds],
        sources=inputs.sources,
        groups=[
            {"name": name, "samples": [_sample(sample) for sample in samples]}
            for name, samples in groupby(inputs.samples, key=lambda sample: sample.source)
        ],
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(text: str) -> str:
    """A text with its invisible characters written out, line breaks and tabs as they are."""
    return text.translate(_IN_TURNS)


def chip_text(text: str) -> str:
    """A token's text with all of it visible."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return text.translate(_IN_CHIPS) or "·"


def _images(sample: Sample) -> list[ImageRun]:
    return [run for run in sample.tokens if isinstance(run, ImageRun)]


def _sample(sample: Sample) -> dict[str, Any]:
    record = sample.record
    facts = [sample.place]
    if record is not None:
        facts += [f"task {record.task}"] if record.task is not None else []
        facts += ["text-only"] if not record.images else []
    turns = [] if record is None else record.turns
    return {
        "id": shown(record.id) if record is not None else sample.place,
        "facts": shown(", ".join(facts)),
        "problem": None if sample.problem is None else shown(sample.problem),
        "pictures": [_picture(picture) for picture in sample.pictures],
        "turns": [
            {"role": turn.role, "text": shown(turn.text), "cut": sample.problem is None and i >= sample.kept_turns}
            for i, turn in enumerate(turns)
        ],
        "stretches": [
            {"supervised": supervised, "chips": _chips(list(tokens))}
            for supervised, tokens in groupby(sample.tokens, key=lambda token: bool(token.supervised))
        ],
        "counts": _counts(sample),
    }


def _counts(sample: Sample) -> str:
    parts = [f"{sample.length:,} tokens", f"{sample.visual:,} visual", f"{sample.supervised:,} supervised"]
    if sample.cut_tokens and sample.record is not None:
        turns = len(sample.record.turns) - sample.kept_turns
        parts.append(f"{turns} turns ({sample.cut_tokens:,} tokens) cut by max_length")
    return ", ".join(parts)


def _chips(tokens: Sequence[Token | ImageRun]) -> Iterable[dict[str, Any]]:
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if isinstance(token, ImageRun):
            order = ", ".join(f"{count} {kind.name.lower()}" for kind, count in token.runs)
            yield {
                "text": f"image {token.number + 1}",
                "kinds": [(kind.name.lower(), count) for kind, count in token.counts.items()],
                "title": f"in this order: {order}",
            }
        else:
            has_more = isinstance(following, Token) and "\n" in following.text
            yield {
                "text": chip_text(token.text),
                "kinds": [],
                "special": token.special,
                "title": str(token.id),
                "break": "\n" in token.text and not has_more,
            }


def _picture(picture: Picture) -> dict[str, Any]:
    size, side = f"{picture.width} x {picture.height}", picture.view.width
    views = [_view(picture.view, f"{picture.name} as the model sees it")]
    if picture.local is None:
        caption = f"{picture.name}: {size} became {side} x {side}"
    else:
        tiled = _view(picture.local, f"{picture.name} in tiles", picture.columns, picture.rows)
        views = [tiled, _view(picture.view, f"{picture.name}, global view", longest=LARGEST // 3)]
        tiles = f"{picture.columns} x {picture.rows} tiles of {side} x {side}"
        caption = f"{picture.name}: {size} became {tiles}, and a global view of {side} x {side}"
    return {"views": views, "caption": shown(caption)}


def _view(image: Image.Image, alt: str, columns: int = 1, rows: int = 1, longest: int = LARGEST) -> dict[str, Any]:
    """An image to embed, with lines where it is cut into tiles."""
    small = image.copy()
    small.thumbnail((longest, longest))
    factor = max(1, min(SMALLEST, longest) // max(small.size))
    if columns * rows > 1:
        # Lines of one pixel would hide much of a small picture: it is enlarged before they are drawn.
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
        _draw_grid(small, columns, rows)
        factor = 1
    return {
        "uri": _uri(small),
        "width": small.width * factor,
        "height": small.height * factor,
        "alt": shown(alt),
        "small": factor > 1,
    }


def _draw_grid(image: Image.Image, columns: int, rows: int) -> None:
    """White lines with black edges, which are seen on every picture."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    lines = [(round(i * width / columns), 0, round(i * width / columns), height) for i in range(1, columns)]
    lines += [(0, round(i * height / rows), width, round(i * height / rows)) for i in range(1, rows)]
    for colour, thickness in (("black", 3), ("white", 1)):
        for line in lines:
            draw.line(line, fill=colour, width=thickness)


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if image.width * image.height <= PNG_PIXELS:
        image.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue(), "image/png")
    image.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")
