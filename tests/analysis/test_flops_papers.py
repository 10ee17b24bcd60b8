"""FLOPs against the figures that the papers print."""

import pytest

from skipvision_train.analysis import flops
from skipvision_train.analysis.geometry import load_geometry, text_config
from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    DENSE_RULE,
    TokenKind,
    compose,
    dense,
    fastv,
    ffn_skip,
    preset,
    shortv,
    skip_ffn,
    vskip,
    vtw,
)

LLAVA_7B = text_config(load_geometry("llava_1_5_7b"))
LLAMA3_8B = text_config(load_geometry("llama3_8b"))
LLAVA_COUNTS = {TokenKind.TEXT: 66.64, TokenKind.RETAINED: 576}
NINETEEN = tuple(range(12, 31))

FIGURES = {
    "dense": (dense(), "8.540"),
    "vskip": (vskip(NINETEEN), "7.690"),
    "vskip_norm": (vskip(NINETEEN, bypass="norm"), "7.690"),
    "shortv": (shortv(NINETEEN), "4.730"),
    "shortv_published": (preset("shortv", "llava_1_5_7b"), "4.730"),
    "ffn_skip": (ffn_skip(NINETEEN), "5.58"),
    "vtw": (vtw(16), "4.703"),
    "vtw_15_text_only_layers": (vtw(17), "4.943"),
    "vtw_28": (vtw(28), "7.58"),
}
"""TFLOPs of LLaVA-1.5-7B. V-Skip's Table 3 prints 8.54, 7.69, 4.72 and, for VTW, what 15 text-only layers cost."""


@pytest.mark.parametrize("count", [flops.sequence_flops, flops.v_skip_flops])
@pytest.mark.parametrize(("plan", "printed"), FIGURES.values(), ids=FIGURES)
def test_llava_7b_figures(plan, printed, count):
    tera = count(LLAVA_7B, LLAVA_COUNTS, plan.bind(32)).total / 1e12
    assert f"{tera:.{len(printed) - 2}f}" == printed


@pytest.mark.parametrize(
    ("plan", "printed"),
    [(dense(), "30.74"), (vskip(NINETEEN), "26.57"), (shortv(NINETEEN), "15.73")],
    ids=["dense", "vskip", "shortv"],
)
def test_llava_next_figures_are_means_over_two_lengths(plan, printed):
    """V-Skip's Table 3 fixes the visual tokens: mean 2,109, deviation 413; t = 66.1 gives the dense row."""
    pair = ({TokenKind.TEXT: 66.1, TokenKind.RETAINED: 2109 + deviation} for deviation in (-413, 413))
    tera = sum(flops.sequence_flops(LLAVA_7B, counts, plan.bind(32)).total for counts in pair) / 2e12
    assert f"{tera:.2f}" == printed


@pytest.mark.parametrize(
    ("plan", "printed"),
    [
        (fastv(5), "61.66"),
        (compose([fastv(5), vskip((4, *range(14, 32)))]), "56.7"),
        (fastv(3), "58.8"),
        (compose([fastv(3), vskip(range(13, 32))]), "54.1"),
    ],
    ids=["K=5", "K=5 and V-Skip", "K=3", "K=3 and V-Skip"],
)
def test_fastv_and_vskip(plan, printed):
    """V-Skip's Table 2 prints 61.66 and 56.73, which K = 5 gives, not the K = 3 of its text; ranking is not in it."""
    total, whole = (flops.v_skip_flops(LLAVA_7B, LLAVA_COUNTS, p.bind(32)).total for p in (plan, dense()))
    assert f"{100 * total / whole:.{len(printed) - 3}f}" == printed


@pytest.mark.parametrize("counts", [LLAVA_COUNTS, {TokenKind.TEXT: 10, TokenKind.SKIPPED: 7, TokenKind.MIDDLE: 3}])
def test_papers_closed_formulas(counts):
    """ShortV's formulas as printed, against both counts of a layer."""
    h, m, t = 4096, 11008, counts[TokenKind.TEXT]
    v = sum(counts.values()) - t
    n = t + v
    whole, frozen = (
        2 * n * (4 * h + 3 * m) * h + 4 * n**2 * h,
        2 * t * (4 * h + 3 * m) * h + 4 * v * h**2 + 4 * t * n * h,
    )
    assert flops.v_skip_layer_flops(n, 0, 0, h, m).total == pytest.approx(whole, rel=1e-12)
    assert flops.v_skip_layer_flops(n, v, v, h, m).total == pytest.approx(frozen, rel=1e-12)
    assert flops.layer_flops(LLAVA_7B, counts, DENSE_RULE).total == pytest.approx(whole, rel=1e-12)
    rule = shortv([0]).bind(1).rules[0]
    assert flops.layer_flops(LLAVA_7B, counts, rule).total == pytest.approx(frozen, rel=1e-12)


def test_vskip_saving_is_mostly_projections():
    full = flops.layer_flops(LLAVA_7B, LLAVA_COUNTS, DENSE_RULE)
    skipped = flops.layer_flops(LLAVA_7B, LLAVA_COUNTS, vskip([0]).bind(1).rules[0])
    assert f"{(full.projections - skipped.projections) / 1e9:.2f}" == "38.65"
    assert f"{(full.attention - skipped.attention) / 1e9:.2f}" == "6.06"
    assert full.ffn == skipped.ffn


def _image(retained, skipped=0, summary=0):
    return {TokenKind.RETAINED: retained, TokenKind.SKIPPED: skipped, TokenKind.SUMMARY: summary}


SKIP_VISION_ROWS = {
    "SV-LLaVA 100/156": (skip_ffn(), _image(100, 156, 2), 576, "25.1"),
    "without summaries": (skip_ffn(), _image(100, 156), 576, "24.7"),
    "SV-LLaVA 256/316": (skip_ffn(), _image(256, 316), 576, "60.3"),
    "SV-CoS": (skip_ffn(), _image(273, 255, 2), 1296, "26.2"),
    "SV-CoS 272/256": (skip_ffn(), _image(272, 256), 1296, "26.0"),
    "SV-LLaVA-HD": (skip_ffn(), _image(576, 576, 2), 2880, "24.7"),
    "SV-LLaVA-HD without merging": (skip_ffn(), _image(576, 2304, 2), 2880, "47.3"),
    "MQT": (dense(), _image(256), 576, "44.0"),
    "TokenPacker": (dense(), _image(144), 576, "24.6"),
    "FastV K=2": (fastv(2, 144), _image(576), 576, "29.4"),
    "FastV K=3": (fastv(3, 0.25), _image(0, 576), 576, "31.7"),
}


@pytest.mark.parametrize(("plan", "counts", "reference", "printed"), SKIP_VISION_ROWS.values(), ids=SKIP_VISION_ROWS)
def test_skip_vision_table_2(plan, counts, reference, printed):
    """Text changes nothing: the formula counts visual tokens."""
    cost = flops.skip_vision_flops(LLAMA3_8B, {**counts, TokenKind.TEXT: 50}, plan.bind(32)).total
    whole = flops.skip_vision_flops(LLAMA3_8B, _image(reference), dense().bind(32)).total
    assert whole == 32 * (4 * reference * 4096**2 + 2 * reference**2 * 4096 + 3 * reference * 4096 * 14336)
    assert f"{100 * cost / whole:.1f}" == printed


def test_skip_visions_formula_cannot_express_missing_queries():
    with pytest.raises(PlanError, match="one number for queries and keys"):
        flops.skip_vision_flops(LLAMA3_8B, _image(5), vskip([0]).bind(32))
