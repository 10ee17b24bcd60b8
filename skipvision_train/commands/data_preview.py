"""``skipvision data preview``: a page with samples of a recipe as ``skipvision train`` would feed them."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_train.config.specs import TrainConfig
from skipvision_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skipvision_train.data.mixture import Mixture
    from skipvision_train.data.preview import Encoder, Sample
    from skipvision_train.data.processor import SkipVisionProcessor
    from skipvision_train.data.streams import Streams

log = logging.getLogger(__name__)


@dataclass
class Config(TrainConfig):
    """Settings of ``skipvision data preview``: those of ``skipvision train``, of which ``model``, ``stage`` and
    ``data`` say how a record becomes a sample, and these."""

    recipe: str = "???"
    """Name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any; instead of
    ``data.recipe``."""
    checkpoint: str | None = None
    """Instead of ``model`` and ``stage``: a model directory, whose processor encodes with its template."""
    samples: int = 4
    """Records of every source."""
    seed: int = 0
    """Seeds which ones."""
    output: str | None = None
    """The HTML file; null is ``outputs/data_preview/<recipe>.html``."""


def run(cfg: Config) -> None:
    """Draw, encode, write the page, print where it is; with ``dry_run`` only print what is drawn."""
    check(cfg)
    from skipvision_train.analysis.preview_page import PreviewInputs, render_preview
    from skipvision_train.data.preview import draw, summaries
    from skipvision_train.data.recipes import load_recipe, load_records, load_streams
    from skipvision_train.files import write_text

    recipe = load_recipe(cfg.recipe, cfg.data.root)
    encoder = open_encoder(cfg)
    records = load_streams(recipe) if cfg.data.streaming else load_records(recipe)
    drawn = list(draw(records, cfg.samples, cfg.seed, cfg.data.stream_buffer))
    path = Path(cfg.output or f"outputs/data_preview/{recipe.name.replace(':', '_')}.html")
    if cfg.dry_run:
        sys.stdout.write(drawing(path, drawn) + "\n")
        return
    samples = [encoder.sample(sample) for sample in drawn]
    title = f"Samples of {recipe.name}"
    page = render_preview(PreviewInputs(title, facts(cfg, records, encoder), summaries(records, samples), samples))
    try:
        write_text(path, page)
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be written: {error.strerror}") from error
    sys.stdout.write(summary(path, samples) + "\n")


def check(cfg: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.config.validate import RESIZERS, validate

    if cfg.samples < 1:
        raise ConfigError(f"samples: {cfg.samples} is out of range; use 1 or more")
    if cfg.output is not None and Path(cfg.output).is_dir():
        raise ConfigError(f"output: {cfg.output} is a folder; name a file")
    cfg.data.recipe = cfg.recipe
    if cfg.checkpoint is None:
        validate(cfg, 1)
        return
    # The model's groups say nothing then: data that fits the checkpoint need not fit them.
    if cfg.data.max_length < 1:
        raise ConfigError(f"data.max_length: {cfg.data.max_length} is out of range; use 1 or more")
    if cfg.data.resizer not in RESIZERS:
        raise ConfigError(f"data.resizer: {cfg.data.resizer!r} is unknown; use {', '.join(RESIZERS)}")


def open_encoder(cfg: Config) -> Encoder:
    """What turns records into samples.

    Raises:
        SkipVisionError: model, tokenizer and template do not fit each other, or are not there.
    """
    from skipvision_train.data.preview import Encoder
    from skipvision_train.inference.loading import load_processor

    if cfg.checkpoint is not None:
        processor = load_processor(cfg.checkpoint)
        template = processor.template
    else:
        processor, template = _processor(cfg), cfg.stage.template
    return Encoder(processor, template, cfg.data.max_length, cfg.data.draft, cfg.data.resizer)


def _processor(cfg: Config) -> SkipVisionProcessor:
    from skipvision_train.config.resolve import load_tokenizer, model_config
    from skipvision_train.data.processor import SkipVisionProcessor

    tokenizer = load_tokenizer(cfg)
    if tokenizer is None:
        raise ConfigError(
            "model.tokenizer: null, and neither model.llm nor stage.start_from gives one; name what will be trained "
            "(experiment=...), or a model (checkpoint=...)"
        )
    try:
        return SkipVisionProcessor.from_config(model_config(cfg, tokenizer), tokenizer, cfg.stage.template)
    except DataError as error:
        raise ConfigError(f"stage.template: {error}") from error


def facts(cfg: Config, records: Mixture | Streams, encoder: Encoder) -> dict[str, str]:
    """What holds for all samples."""
    processor = encoder.processor
    tokenizer, side = processor.tokenizer, processor.vision["image_size"]
    tokens = {int(tiles): processor.tokens_of(int(tiles)) for tiles in processor.image_tokens}
    each = ", ".join(f"{count:,} for {tiles} tiles" if tiles > 1 else f"{count:,}" for tiles, count in tokens.items())
    tiling = processor.tiling["mode"]
    found = {
        "recipe": f"{cfg.recipe}, hash {records.hash}",
        "model": cfg.checkpoint or f"stage {cfg.stage.name} from {cfg.stage.start_from or cfg.model.llm or 'nothing'}",
        "template": encoder.template,
        "tokenizer": f"{tokenizer.name_or_path or type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        "images": f"{side} x {side} pixels" + (f", tiling {tiling}" if tiling != "none" else ""),
        "visual tokens": f"{each}; each the placeholder {processor.image_token} ({processor.image_token_id})",
        "max_length": f"{encoder.max_length:,}",
        "seed": str(cfg.seed),
    }
    if cfg.data.pack:
        found["packing"] = "training puts several samples into a row; here each stands alone"
    return found


def drawing(path: Path, drawn: Sequence[Sample]) -> str:
    """A line per record that the page would show, and where the page would be."""
    lines = []
    for sample in drawn:
        about = sample.problem if sample.record is None else sample.record.id
        lines.append(f"{sample.source}, {sample.place}: {' '.join(str(about).split())}")
    return "\n".join([*lines, f"would write {path}: {len(drawn)} samples"])


def summary(path: Path, samples: Sequence[Sample]) -> str:
    """What was written, in a line."""
    unusable = sum(sample.problem is not None for sample in samples)
    return f"wrote {path}: {len(samples)} samples, {unusable} of them cannot be used"
