"""The papers' settings per model: what each method ran with, so that a table row is a name."""

from __future__ import annotations

from collections.abc import Callable

from skipvision_train.errors import PlanError
from skipvision_train.plans.methods import dense, fastv, pyramiddrop, shortv, skip_ffn, sparsevlm, victor, vtw
from skipvision_train.plans.plan import SkipPlan

VSKIP_COUNT = {
    "llava_1_5_7b": 19,
    "llava_next_7b": 19,
    "llava_1_5_13b": 24,
    "llava_next_13b": 24,
    "qwen2_5_vl_7b": 7,
}
"""N, how many layers V-Skip takes (V-Skip, Sec. 4). Which ones follows from calibration; the paper prints no list."""

SHORTV_LAYERS = {
    "llava_1_5_7b": (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    "llava_1_5_13b": (
        39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17,
    ),
    "llava_next_7b": (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    "llava_next_13b": (
        39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17,
    ),
}  # fmt: skip
"""The layers that ShortV's authors publish, least important first; the first N are the plan for a smaller N."""

VTW_LAYER = {
    "llava_1_5_7b": 16,
    "llava_next_7b": 16,
    "llava_1_5_13b": 20,
    "llava_next_13b": 20,
    "qwen2_5_vl_7b": 7,
}
"""K of VTW in V-Skip's Table 1 and its Qwen2.5-VL rows."""

MODELS = tuple(VSKIP_COUNT)

THREE_DIMENSIONAL = ("qwen2_5_vl_7b",)
"""Models whose rotary positions are frames, rows and columns: they cannot be closed up after a drop."""

_SAME_FOR_ALL: dict[str, Callable[[], SkipPlan]] = {
    "dense": dense,
    "skip_ffn": skip_ffn,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "victor": victor,
}


def preset(method: str, model: str) -> SkipPlan:
    """The plan a paper ran ``method`` with on ``model``, or its one published setting where it does not name the model.

    Where positions cannot be closed up, PyramidDrop keeps them and SparseVLM is version 2, which does.

    Args:
        method: ``dense``, ``skip_ffn``, ``shortv``, ``vtw``, ``fastv``, ``pyramiddrop``, ``sparsevlm`` or ``victor``.
        model: one of :data:`MODELS`.

    Raises:
        PlanError: an unknown model or method, or a method whose layers for this model nobody has published.
    """
    if model not in MODELS:
        raise PlanError(f"preset: model {model!r} is unknown; use {', '.join(MODELS)}")
    if model in THREE_DIMENSIONAL and method == "pyramiddrop":
        return pyramiddrop(positions="keep")
    if model in THREE_DIMENSIONAL and method == "sparsevlm":
        return sparsevlm(version=2)
    if method in _SAME_FOR_ALL:
        return _SAME_FOR_ALL[method]()
    if method == "vtw":
        return vtw(VTW_LAYER[model])
    if method == "shortv" and model in SHORTV_LAYERS:
        return shortv(SHORTV_LAYERS[model])
    known = ", ".join([*_SAME_FOR_ALL, "shortv", "vtw"])
    raise PlanError(
        f"preset: no published layers of {method!r} for {model}; presets exist for {known}. V-Skip's layers come from "
        f"calibration (the paper takes {VSKIP_COUNT[model]} of them): run skipvision calibrate"
    )
