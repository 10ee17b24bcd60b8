"""Draw ``accuracy.svg`` from the first table of ``docs/results.md``: accuracy against FLOPs, with intervals.

``make reference`` runs it; a test compares its output with the picture in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results.md"
PICTURE = HERE / "accuracy.svg"

HEADER = "| method | N | KL (nats) | accuracy (%) | FLOPs (%) |"
SHOWN = {"V-Skip": "a", "FFN-Skip": "b", "ShortV": "c", "VTW": "d"}
"""Methods of the table that are drawn, and the class of their colour."""

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 44, 52
X, Y = (35.0, 80.0), (10.0, 80.0)

STYLE = """
svg{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;--ink:#1f2328;--soft:#656d76;--grid:#d8dee4;--paper:#ffffff;
--a:#0969da;--b:#1a7f37;--c:#bc4c00;--d:#8250df}
@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#9198a1;--grid:#30363d;--paper:#0d1117;
--a:#4493f8;--b:#3fb950;--c:#f0883e;--d:#ab7df8}}
rect{fill:var(--paper)}text{fill:var(--ink)}.soft{fill:var(--soft)}.grid{stroke:var(--grid)}path{fill:none;stroke-width:2}
.a{stroke:var(--a)}.b{stroke:var(--b)}.c{stroke:var(--c)}.d{stroke:var(--d)}circle{fill:var(--paper);stroke-width:2}
text.a,text.b,text.c,text.d{stroke:none}text.a{fill:var(--a)}text.b{fill:var(--b)}text.c{fill:var(--c)}text.d{fill:var(--d)}
""".replace("\n", "")

Row = tuple[int, float, float, float, float]
"""Skipped layers, FLOPs, accuracy, lower and upper end of its interval."""


def read_rows(text: str) -> dict[str, list[Row]]:
    """The rows of the methods that are drawn."""
    lines = text[text.index(HEADER) :].splitlines()[2:]
    rows: dict[str, list[Row]] = {}
    for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]:
        method, count, _, accuracy, flops = (cell.strip() for cell in line.strip("|").split("|"))
        value, low, high = map(float, re.findall(r"[\d.]+", accuracy))
        if method in SHOWN:
            rows.setdefault(method, []).append((int(count), float(flops), value, low, high))
    return rows


def across(flops: float) -> float:
    """Pixels from the left."""
    return LEFT + (flops - X[0]) / (X[1] - X[0]) * (WIDTH - LEFT - RIGHT)


def down(accuracy: float) -> float:
    """Pixels from the top."""
    return HEIGHT - BOTTOM - (accuracy - Y[0]) / (Y[1] - Y[0]) * (HEIGHT - TOP - BOTTOM)


def frame() -> list[str]:
    """Background, grid, axes."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}"/>']
    parts.append(
        '<text x="16" y="24" font-weight="600">Accuracy on 700 questions (%) with 0 to 4 of 4 layers skipping</text>'
    )
    for value in range(10, 81, 10):
        y = down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for value in range(40, 81, 10):
        parts.append(
            f'<text class="soft" x="{across(value):.1f}" y="{HEIGHT - 32}" text-anchor="middle">{value}</text>'
        )
    middle = across(sum(X) / 2)
    parts.append(
        f'<text class="soft" x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">prefill FLOPs, % of dense</text>'
    )
    return parts


def curve(method: str, rows: list[Row], names: dict[str, float]) -> list[str]:
    """One method: a line through its points, intervals, and its name at the end."""
    colour = SHOWN[method]
    points = " L".join(f"{across(flops):.1f} {down(value):.1f}" for _, flops, value, _, _ in rows)
    parts = [f'<path class="{colour}" d="M{points}"/>']
    for count, flops, value, low, high in rows:
        x = across(flops)
        parts.append(f'<line class="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{down(low):.1f}" y2="{down(high):.1f}"/>')
        parts.append(
            f'<circle class="{colour}" cx="{x:.1f}" cy="{down(value):.1f}" r="4">'
            f"<title>{method}, {count} of 4 layers: {value} % ({low} to {high}) at {flops} % of FLOPs</title></circle>"
        )
    _, flops, value, _, _ = rows[-1]
    parts.append(
        f'<text class="{colour}" x="{across(flops) - 8:.1f}" y="{down(value) + names[method]:.1f}" text-anchor="end">'
        f"{method}</text>"
    )
    return parts


def draw(rows: dict[str, list[Row]]) -> str:
    """The picture."""
    shift = {"V-Skip": 22.0, "FFN-Skip": -14.0, "ShortV": 4.0, "VTW": -10.0}
    parts = [*frame(), *(part for method in SHOWN for part in curve(method, rows[method], shift))]
    label = "Accuracy against prefill FLOPs for V-Skip, FFN-Skip, ShortV and VTW on the demo's model"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(read_rows(RESULTS.read_text())))
