"""``skipvision data check``: read everything of a recipe, say what cannot be used and what an epoch takes."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_train.config.plans import PlanSpec
from skipvision_train.config.specs import ModelSpec
from skipvision_train.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from skipvision_train.data.check import Measure, Tally
    from skipvision_train.data.check_report import Cost
    from skipvision_train.data.mixture import Part
    from skipvision_train.data.recipes import Recipe

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision data check``. Without ``model`` or ``checkpoint`` images take no tokens and nothing is
    said about GPU hours; without a tokenizer text is estimated from its bytes."""

    recipe: str = "???"
    """Name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any."""
    root: str | None = None
    """Directory that the recipe's paths are relative to."""
    output: str | None = None
    """Folder for ``bad.jsonl`` and ``check.json``; null is ``outputs/data_check/<recipe>``."""
    workers: int = 4
    """Processes that read; 0 reads in this one. Their number changes no figure."""
    pixels: bool = False
    """Look for duplicates by pixels as well: the same picture in files of several formats. Takes 8 bytes more per
    image, and some time."""
    model: ModelSpec | None = None
    """The model that will be trained: a file of ``conf/model`` and its fields. ``model.tokenizer`` or ``model.llm`` is
    where the tokenizer is."""
    checkpoint: str | None = None
    """Instead of ``model``: a model directory, with its tokenizer."""
    plan: PlanSpec | None = None
    """What the model skips, as ``skipvision train`` reads it; null is what ``checkpoint`` skips, and nothing for
    ``model``."""
    template: str | None = None
    """Chat format; null is that of ``checkpoint``, and llama3 for ``model``."""
    max_length: int | None = 2048
    """Longest sample in tokens, as ``data.max_length`` of the run; what cannot be cut to it is unusable. null allows
    any. Read where a model is given."""
    error_budget: int = 0
    """Unusable records that sources without ``max_malformed`` may have together, as ``data.error_budget`` of the run; 0
    is ``data.on_error=error``."""
    peak_tflops: float = 989.0
    """Of one GPU, for GPU hours; the default is an H100's in bf16 without sparsity."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""
    backward: float = 2.0
    """FLOPs of the backward pass over those of the forward pass; 3 with gradient checkpointing. Frozen parts take less
    than that."""


def run(cfg: Config) -> None:
    """Read, write ``bad.jsonl`` and ``check.json``, print; an error at the end if a budget is exceeded."""
    validate(cfg)
    from skipvision_train.data.check_report import as_text, budgets
    from skipvision_train.data.recipes import load_recipe
    from skipvision_train.files import write_json

    recipe = load_recipe(cfg.recipe, cfg.root)
    measure = read_measure(cfg)
    parts = open_parts(recipe)
    folder = Path(cfg.output or f"outputs/data_check/{recipe.name.replace(':', '_')}")
    tallies = read_everything(cfg, parts, measure, folder / "bad.jsonl")
    over = budgets(parts, tallies, cfg.error_budget)
    found = summary(cfg, recipe, parts, tallies, measure) | {"over_budget": over}
    write_json(folder / "check.json", found)
    sys.stdout.write(as_text(found) + "\n")
    log.info("wrote %s and bad.jsonl beside it", folder / "check.json")
    if over:
        raise DataError(f"{recipe.name}: {'; '.join(over)}; {folder / 'bad.jsonl'} lists them")


def validate(cfg: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the field.
    """
    for name, least in (("workers", 0), ("error_budget", 0), ("max_length", 1), ("backward", 0)):
        value = getattr(cfg, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}: {value} is out of range; use {least} or more")
    if not (cfg.peak_tflops > 0 and math.isfinite(cfg.peak_tflops)):
        raise ConfigError(f"peak_tflops: {cfg.peak_tflops} is out of range; use a number above 0")
    if not 0 < cfg.mfu <= 1:
        raise ConfigError(f"mfu: {cfg.mfu} is out of range; use a share above 0 and at most 1")
    if cfg.model is not None and cfg.checkpoint is not None:
        raise ConfigError(f"checkpoint: {cfg.checkpoint} with a model; give one of them")
    if cfg.plan is not None and cfg.model is None and cfg.checkpoint is None:
        raise ConfigError(f"plan: {cfg.plan.method} of no model; give model=... or checkpoint=..., or plan=null")
    if cfg.output is not None and Path(cfg.output).exists() and not Path(cfg.output).is_dir():
        raise ConfigError(f"output: {cfg.output} is a file; name a folder")


def read_measure(cfg: Config) -> Measure:
    """The model's configuration, with its plan, and the tokenizer, as far as they are given.

    Raises:
        SkipVisionError: what is given cannot be used together.
    """
    from skipvision_train.data.check import Measure

    if cfg.model is None and cfg.checkpoint is None:
        return Measure()
    from skipvision_train.config.resolve import load_tokenizer, model_config
    from skipvision_train.config.specs import StageSpec, TrainConfig
    from skipvision_train.data.templates import get_template

    template = cfg.template or "llama3"
    try:
        get_template(template)
    except DataError as error:
        raise ConfigError(f"template: {error}") from error
    if cfg.checkpoint is not None:
        return _of_checkpoint(cfg, cfg.checkpoint)
    assert cfg.model is not None
    train = TrainConfig(model=cfg.model, plan=cfg.plan or PlanSpec("dense"), stage=StageSpec(template=template))
    tokenizer = load_tokenizer(train)
    if tokenizer is not None:
        try:
            get_template(template).end(tokenizer)
        except DataError as error:
            raise ConfigError(f"template: {error}") from error
    return Measure(model_config(train, tokenizer), tokenizer, template, cfg.max_length)


def _of_checkpoint(cfg: Config, checkpoint: str) -> Measure:
    from transformers import AutoConfig

    from skipvision_train.config.plans import build_plan
    from skipvision_train.data.check import Measure
    from skipvision_train.inference.loading import check_model_directory, load_processor, readable
    from skipvision_train.models.configuration import SkipVisionConfig

    check_model_directory(checkpoint)
    with readable(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    if not isinstance(config, SkipVisionConfig):
        raise CheckpointError(f"checkpoint: {checkpoint} holds a {config.model_type} model, not a Skip-Vision one")
    processor = load_processor(checkpoint)
    own = config.plan_or_dense()
    plan = build_plan(cfg.plan or PlanSpec("own"), own.num_layers, own=own)
    config.skip_plan = None if plan.is_dense else plan.to_dict()
    return Measure(config, processor.tokenizer, cfg.template or processor.template, cfg.max_length)


def open_parts(recipe: Recipe) -> list[Part]:
    """Open all sources.

    Raises:
        DataError: listing every source that cannot be opened.
    """
    from skipvision_train.data.mixture import Part

    parts, failed = [], []
    for source in recipe.sources:
        try:
            parts.append(Part.open(source))
        except DataError as error:
            failed.append(f"  {source.name}: {error}")
    if failed:
        raise DataError(
            f"{recipe.name}: {len(failed)} of {len(recipe.sources)} sources cannot be opened:\n" + "\n".join(failed)
        )
    return parts


def read_everything(cfg: Config, parts: Sequence[Part], measure: Measure, bad: Path) -> list[Tally]:
    """Check every record, with a progress bar; what cannot be used is written to ``bad`` as it is found.

    Raises:
        DataError: a worker process was lost; nothing is written then.
    """
    from tqdm import tqdm

    from skipvision_train.data.check import RecordCheck, Tally, check_records

    check = RecordCheck(parts, measure, cfg.pixels)
    tallies = [Tally(number) for number in range(len(parts))]
    bad.parent.mkdir(parents=True, exist_ok=True)
    temporary = bad.with_name(bad.name + ".tmp")
    # disable=None: silent where stderr is no terminal
    with temporary.open("w", encoding="utf-8") as file, tqdm(total=len(check), unit=" records", disable=None) as bar:

        def each(tally: Tally) -> None:
            source = parts[tally.source].source.name
            for one in tally.bad:
                line = {"source": source, "index": one.index, "id": one.id, "image": one.image, "reason": one.reason}
                file.write(json.dumps(line | {"message": one.message}) + "\n")
            tally.bad = []
            tallies[tally.source].add(tally)
            bar.update(tally.records)

        check_records(check, cfg.workers, each)
    temporary.replace(bad)
    return tallies


def summary(
    cfg: Config, recipe: Recipe, parts: Sequence[Part], tallies: Sequence[Tally], measure: Measure
) -> dict[str, Any]:
    """The content of ``check.json``."""
    from skipvision_train.data.check_report import duplicates, figures

    costs = [epoch_cost(cfg, tally, measure) for tally in tallies]
    sources = [figures(part, tally, measure, cost) for part, tally, cost in zip(parts, tallies, costs, strict=True)]
    added = ["records", "epoch", "bad", "bad_in_epoch", "text_only", "tokens", "visual_tokens"]
    if measure.config is not None:
        added += ["flops", "gpu_hours"]
    return {
        "recipe": recipe.name,
        "exact": measure.tokenizer is not None,
        "images_measured": measure.config is not None,
        "max_length": measure.max_length,
        "error_budget": cfg.error_budget,
        "total": {name: sum(source[name] for source in sources) for name in added},
        "sources": sources,
        "duplicates": duplicates(tallies, [part.source.name for part in parts], cfg.pixels),
        "notes": notes(cfg, measure),
    }


def notes(cfg: Config, measure: Measure) -> list[str]:
    """What the figures stand on."""
    from skipvision_train.data.dataset import BYTES_PER_TOKEN

    lines = []
    if measure.tokenizer is None:
        lines.append(f"text is estimated: {BYTES_PER_TOKEN} bytes a token, no template; a model's tokenizer counts it")
    if measure.config is None:
        lines.append("images are not counted as tokens; model=... or checkpoint=... says how many they become")
        return lines
    plan = measure.config.plan_or_dense()
    lines.append(
        f"GPU hours: plan {plan.name}, backward {cfg.backward:g} times forward, {cfg.peak_tflops:g} TFLOPS at an MFU "
        f"of {100 * cfg.mfu:g} %, every part trained, no padding"
    )
    return lines


def epoch_cost(cfg: Config, tally: Tally, measure: Measure) -> Cost | None:
    """Of an epoch of one source; None without a model."""
    if measure.config is None:
        return None
    from skipvision_train.analysis.flops import lm_head_flops, sequence_flops
    from skipvision_train.analysis.image_flops import image_flops
    from skipvision_train.data.check_report import Cost, token_shapes
    from skipvision_train.plans.rules import TokenKind

    config, plan = measure.config, measure.config.plan_or_dense()
    counts = config.tiling_config.counts
    kinds = {tiles: Counter(config.image_token_kinds(tiles)) for tiles in counts}
    before = {tiles: image_flops(config, tiles).total for tiles in counts}
    forward, supervised = 0.0, tally.supervised
    for (text, tiles), times in token_shapes(tally, measure).items():
        tokens = sum((kinds[count] for count in tiles), Counter({TokenKind.TEXT: text}))
        images = sum(before[count] for count in tiles)
        forward += times * (sequence_flops(config.text_config, tokens, plan).total + images)
        supervised += times * text if measure.tokenizer is None else 0
    forward += lm_head_flops(config.text_config, supervised)
    return Cost((1 + cfg.backward) * forward, cfg.peak_tflops, cfg.mfu, cfg.backward)
