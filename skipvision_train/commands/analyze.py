"""``skipvision analyze``: the analyses of the Skip-Vision paper on any checkpoint, as numbers and pictures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipvision_train.analysis.geometry import Geometry
from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError
from skipvision_train.files import write_json
from skipvision_train.folders import ResultsFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from skipvision_train.analysis.paper_report import Analysis
    from skipvision_train.calibration.samples import Sample
    from skipvision_train.data.records import Record
    from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)

PARTS = ("flops", "ffn", "similarity", "attention", "bound")
PICTURES = (
    "attention_heads",
    "attention_map",
    "attention_mass",
    "error_bound",
    "ffn_impact",
    "flops_share",
    "similarity",
)
"""What may be drawn."""


@dataclass
class Config:
    """Settings of ``skipvision analyze``."""

    checkpoint: str | None = None
    """Model directory: ours, or a vision-language model of transformers. parts=[flops] with ``geometry`` needs none."""
    recipe: str | None = None
    """Prompts: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; null: the recipe file's own folder."""
    prompts: str | None = None
    """Instead of a recipe: a JSONL file; a line has ``image`` or ``images``, ``prompt``, maybe ``answer``, ``task``."""
    task: str | None = None
    """Take the records of this task alone; null takes all, evenly."""
    samples: int = 8
    """Records drawn at random; those without an image are not drawn."""
    seed: int = 0
    """Seeds the draw."""
    output: str = "???"
    """Folder for ``analysis.json`` and the pictures."""
    overwrite: bool = False
    """Replace the results of another configuration that stand in ``output``; without it they are refused. The same
    configuration is measured again, and its results are replaced."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """Some of flops (Figure 2), ffn (Figure 3), similarity (Figure 5), attention (Figures 7, 8), bound (Sec. 5)."""
    plan: PlanSpec = field(default_factory=lambda: PlanSpec("own"))
    """The plan that runs in ffn and attention, and that bound compares with dense: a file of ``conf/plan`` and its
    fields, or a plan file's path; ``own`` is what the checkpoint has. Where it skips no FFN, bound skips those of all
    visual tokens."""
    dense_impact: bool = False
    """ffn: run the dense plan instead; skipped tokens then have FFNs in earlier layers, too."""
    generated: int = 8
    """attention: rows of so many generated tokens at most."""
    heads: list[int] = field(default_factory=lambda: [0])
    """attention: heads that are shown one by one."""
    evict: bool = False
    """attention: let the plan's KV-cache eviction hold; without it one sees what skipped tokens would get."""
    power_iterations: int = 500
    """bound: steps of the power iteration per matrix, at most."""
    geometry: Geometry | None = None
    """flops: a file of ``conf/geometry``, single sizes overridden at will; null takes the checkpoint's decoder."""
    visual_tokens: list[float] = field(
        default_factory=lambda: [16, 36, 64, 144, 256, 576, 1024, 1296, 2048, 2880, 4096]
    )
    """flops: numbers of visual tokens."""
    text_tokens: float = 64
    """flops: text tokens beside them."""
    image_token_id: int | None = None
    """What stands for visual tokens, where the model's configuration does not say it."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""


def run(cfg: Config) -> None:
    """Check, load, draw, measure part by part; write ``analysis.json`` and pictures, print the tables."""
    check(cfg)
    from skipvision_train.analysis.figures import to_png

    folder = ResultsFolder.open("analyze", cfg, ("analysis.json", *(f"{name}.png" for name in PICTURES)))
    analysis, facts = analyse(cfg)
    with folder.writing() as output:
        write_json(output / "analysis.json", {**facts, **analysis.to_dict()})
        for name, figure in analysis.figures().items():
            (output / f"{name}.png").write_bytes(to_png(figure))
    sys.stdout.write(analysis.tables() + "\n")
    log.info("wrote %s", folder.path / "analysis.json")


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.analysis.geometry import check_geometry

    if unknown := [part for part in cfg.parts if part not in PARTS]:
        raise ConfigError(f"parts: {unknown[0]!r} is unknown; use some of {', '.join(PARTS)}")
    if not cfg.parts:
        raise ConfigError(f"parts: none; use some of {', '.join(PARTS)}")
    for name in ("samples", "generated", "power_iterations"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name}: {getattr(cfg, name)}; at least 1")
    if cfg.text_tokens < 0:
        raise ConfigError(f"text_tokens: {cfg.text_tokens:g} is negative")
    if not cfg.visual_tokens or min(cfg.visual_tokens) <= 0:
        raise ConfigError(f"visual_tokens: {cfg.visual_tokens}; numbers above 0")
    if len(set(cfg.heads)) < len(cfg.heads):
        raise ConfigError(f"heads: {cfg.heads} names a head twice")
    if cfg.geometry is not None:
        check_geometry(cfg.geometry)
    if cfg.checkpoint is None and (set(cfg.parts) != {"flops"} or cfg.geometry is None):
        raise ConfigError("checkpoint: needs a value; only parts=[flops] with geometry=... can do without a model")
    if set(cfg.parts) != {"flops"} and (cfg.recipe is None) == (cfg.prompts is None):
        raise ConfigError("recipe: give either recipe=... or prompts=... (a JSONL file)")


def analyse(cfg: Config) -> tuple[Analysis, dict[str, Any]]:
    """The parts that are asked for, and what they were measured on."""
    from skipvision_train.analysis.geometry import text_config
    from skipvision_train.analysis.paper_report import Analysis
    from skipvision_train.inference.loading import load_model, package_versions
    from skipvision_train.models.identity import model_hash
    from skipvision_train.plans.families import find_decoder

    analysis, facts = Analysis(), {"checkpoint": cfg.checkpoint, "seed": cfg.seed, "versions": package_versions()}
    geometry = None if cfg.geometry is None else text_config(cfg.geometry)
    records = draw_records(cfg) if set(cfg.parts) != {"flops"} else []
    if cfg.checkpoint is not None and (records or geometry is None):
        model, processor, is_ours = load_model(cfg.checkpoint, cfg.device, cfg.precision)
        facts["model_hash"] = model_hash(model)
        analysis.names = {} if is_ours else {"skipped": "visual"}
        if records:
            facts |= measure(cfg, analysis, model, processor, records, is_ours)
        geometry = geometry or find_decoder(model).config
    if "flops" in cfg.parts and geometry is not None:
        count_flops(cfg, analysis, geometry)
    return analysis, facts


def draw_records(cfg: Config) -> list[Record]:
    """The records whose prompts are shown to the model.

    Raises:
        ConfigError: no record shows an image, there are too few, or the task is unknown.
        DataError: the recipe or the file cannot be read.
    """
    from skipvision_train.calibration.samples import draw, subtask
    from skipvision_train.commands import calibrate

    records = calibrate.read_records(calibrate.Config(recipe=cfg.recipe, prompts=cfg.prompts, data_root=cfg.data_root))
    return draw(records, cfg.samples, cfg.seed, subtask, cfg.task)


def measure(
    cfg: Config, analysis: Analysis, model: Any, processor: Any, records: Sequence[Record], is_ours: bool
) -> dict[str, Any]:
    """Run the parts that need a model; what they ran under and on."""
    from skipvision_train.analysis import attention_maps, bounds, ffn_impact, similarity
    from skipvision_train.calibration.samples import prompt_samples, record_samples
    from skipvision_train.config.plans import build_plan
    from skipvision_train.plans.families import find_decoder
    from skipvision_train.plans.methods import dense

    depth, token = len(find_decoder(model).layers), cfg.image_token_id
    nothing = dense().bind(depth)
    plan: SkipPlan = build_plan(cfg.plan, depth, own=model.plan if is_ours else nothing)
    compared = bounds.skipping_plan(plan, depth) if "bound" in cfg.parts else None
    make: Any = record_samples if is_ours else prompt_samples
    samples: list[Sample] = make(model, processor, records)
    log.info("%d samples, %d layers, plan %s, on %s", len(samples), depth, plan.name, model.device)
    if "ffn" in cfg.parts:
        analysis.ffn = ffn_impact.ffn_impact(model, samples, nothing if cfg.dense_impact else plan, token)
    if "similarity" in cfg.parts:
        analysis.similarity = similarity.similarity_density(model, samples, token)
    if "attention" in cfg.parts:
        analysis.attention = attention_maps.attention_maps(
            model, processor, samples, plan, cfg.generated, cfg.heads, cfg.evict, token
        )
    if compared is not None:
        log.info("spectral norms of %d layers; errors under plan %s", depth, compared.name)
        analysis.bound = bounds.error_bound(model, samples, compared, token, cfg.power_iterations)
    return {"plan": plan.to_dict(), "samples": [sample.id for sample in samples]}


def count_flops(cfg: Config, analysis: Analysis, geometry: PreTrainedConfig) -> None:
    """Figure 2 for the named geometry or the checkpoint's decoder."""
    from skipvision_train.analysis.ffn_impact import flops_shares

    analysis.geometry = "this checkpoint" if cfg.geometry is None else cfg.geometry.name
    analysis.flops = flops_shares(geometry, sorted(cfg.visual_tokens), cfg.text_tokens)
