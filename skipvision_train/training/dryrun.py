"""What a stage would do, from its configuration alone: the model on the meta device, arithmetic, one sample."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from skipvision_train.analysis.flops import sequence_flops, skip_vision_flops
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.config.resolve import skipped_layers
from skipvision_train.config.specs import TrainConfig
from skipvision_train.errors import PlanError
from skipvision_train.folders import flatten
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind
from skipvision_train.training.batching import BatchArithmetic
from skipvision_train.training.lora import Held, held
from skipvision_train.training.memory import estimate_memory
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.stages import PartReport, parameter_groups

ASSUMED_TEXT_TOKENS = 128
"""Text beside one image where no sample is at hand."""

WIDTH = 110


def section(title: str, lines: Iterable[str]) -> str:
    """A title and indented lines."""
    return "\n".join([title, *(f"  {line}" for line in lines)])


def configuration_lines(cfg: TrainConfig) -> list[str]:
    """Every field that is set, a paragraph per group."""
    lines = []
    for group, values in dataclasses.asdict(cfg).items():
        if not isinstance(values, Mapping):
            continue
        items = {key: value for key, value in flatten(values).items() if value not in (None, {}, False)}
        if group == "model" and (cfg.model.llm or cfg.stage.start_from):
            items = {key: value for key, value in items.items() if not key.startswith("text.")}
        text = f"{group}: " + ", ".join(f"{key}={_short(value)}" for key, value in items.items())
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def amount(value: float, unit: str) -> str:
    """A number with a metric prefix: ``6.537 TFLOPs``."""
    factor, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G")) if value >= pair[0]), (1e6, "M"))
    return f"{value / factor:.3f} {prefix}{unit}"


def token_line(config: SkipVisionConfig, tiles: int | None = None) -> str:
    """The tokens of one image by their part: middle ones are retained ones, the last local one is a local one."""
    reducer, kinds = config.reducer_config, Counter(config.image_token_kinds(tiles))
    registers = f", {reducer.registers} registers" if reducer.registers else ""
    last = int(reducer.last_local_ffn)
    retained = kinds[TokenKind.RETAINED] + kinds[TokenKind.MIDDLE] - last
    if reducer.split == "none":
        return f"{retained} retained{registers}"
    local = kinds[TokenKind.SKIPPED] + last
    runs = " (the last one runs the FFN)" if last else ""
    return f"{retained} retained, {local} local{runs}, {reducer.has_former + reducer.has_latter} summary{registers}"


def token_lines(config: SkipVisionConfig) -> list[str]:
    """:func:`token_line` for the fewest and the most tiles that an image can have."""
    counts = config.tiling_config.counts
    if counts == (1,):
        return [token_line(config)]
    return [f"{tiles} tiles: {token_line(config, tiles)}" for tiles in dict.fromkeys((counts[0], counts[-1]))]


def schedule_lines(cfg: TrainConfig, schedule: PlanSchedule, steps: int | None) -> list[str]:
    """Which layers ``stage.skip`` skips, and from when on; nothing where it names none.

    Args:
        cfg: the configuration that the schedule is of.
        schedule: the stage's.
        steps: of the stage; None where the data is unknown.
    """
    if not schedule.layers:
        return []
    names = ", ".join(map(str, skipped_layers(cfg.stage.skip, schedule.plans[0].num_layers)))
    what = f"stage.skip: {cfg.stage.skip.part} for visual tokens in layers {names}"
    if schedule.widen is None:
        return [f"{what} from the first step on"]
    lines = [f"{what}, one after the other from {schedule.widen[0]:.4g} to {schedule.widen[1]:.4g} of the steps"]
    if steps is not None:
        changes = (f"{k} from step {first}" for k, first in enumerate(schedule.first_steps(steps)))
        lines.append(f"layers skipped: {', '.join(changes)}, of {steps} steps")
    return lines


def flops_lines(
    config: SkipVisionConfig, counts: Mapping[TokenKind, int], images: int, schedule: PlanSchedule, steps: int | None
) -> list[str]:
    """FLOPs of one sample's forward pass: the decoder dense and under the plans, and what stands before it.

    Args:
        config: the model.
        counts: positions of each kind in the sample.
        images: images in the sample.
        schedule: the stage's plans.
        steps: of the stage; None where the data is unknown.
    """
    text = config.text_config
    everything = {
        TokenKind.TEXT: counts.get(TokenKind.TEXT, 0),
        TokenKind.RETAINED: images * config.baseline_tokens(config.tiling_config.counts[-1]),
    }
    whole = sequence_flops(text, everything, dense().bind(text.num_hidden_layers)).total

    def decoder(plan: SkipPlan) -> float:
        return sequence_flops(text, counts, plan).total

    stage = {"this stage": decoder(schedule.plans[-1])}
    if schedule.widen is not None:
        stage = {"at the start": decoder(schedule.plans[0]), "at the end": decoder(schedule.plans[-1])}
        if steps is not None:
            stage["mean of the stage"] = schedule.mean(decoder, steps)
    return [
        f"{images} image(s) and {counts.get(TokenKind.TEXT, 0)} text tokens",
        f"decoder, all {everything[TokenKind.RETAINED]} visual tokens dense: {amount(whole, 'FLOPs')}",
        *(f"decoder, {when}: {amount(cost, 'FLOPs')} ({100 * cost / whole:.1f} %)" for when, cost in stage.items()),
        paper_line(config, schedule.plans[-1]),
        f"vision tower, connector and merging: {amount(images * image_flops(config).total, 'FLOPs')}",
    ]


def paper_line(config: SkipVisionConfig, plan: SkipPlan) -> str:
    """Skip-Vision's own count of visual tokens (FLOPs of its Table 2), of the setting's dense baseline."""
    text, kinds = config.text_config, Counter(config.image_token_kinds())
    baseline = config.baseline_tokens(config.tiling_config.counts[-1])
    whole = skip_vision_flops(text, {TokenKind.RETAINED: baseline}, dense().bind(text.num_hidden_layers)).total
    try:
        ratio = f"{100 * skip_vision_flops(text, kinds, plan).total / whole:.1f} % of {baseline} tokens dense"
    except PlanError as error:
        ratio = f"none; {error}"
    return f"by Skip-Vision's formula, visual tokens alone: {ratio}"


def group_lines(cfg: TrainConfig, model: nn.Module) -> list[str]:
    """The optimizer's groups."""
    return [
        f"{group['name']:<10} lr {group['lr']:g}, weight decay {group['weight_decay']:g}, "
        f"{len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} parameters"
        for group in parameter_groups(model, cfg.stage.lr, cfg.stage.weight_decay, cfg.stage.vision_layer_decay)
    ]


def memory_lines(cfg: TrainConfig, counted: Held, processes: int) -> list[str]:
    """Model state per process."""
    estimate = estimate_memory(
        counted.parameters, counted.trainable, cfg.trainer.precision, cfg.deepspeed, processes, counted.packed
    )
    engine = "without DeepSpeed" if cfg.deepspeed is None else f"ZeRO-{cfg.deepspeed.stage}"
    return [
        f"{engine}, {cfg.trainer.precision}, {processes} process(es); activations come on top",
        f"weights {amount(estimate.weights, 'B')} + gradients {amount(estimate.gradients, 'B')} + "
        f"optimizer {amount(estimate.optimizer, 'B')} = {amount(estimate.total, 'B')} per process",
    ]


def part_lines(cfg: TrainConfig, parts: Sequence[PartReport], trainable: int) -> list[str]:
    """Counts per part, and in all; with ``stage.lora`` what is trained in the place of the language model."""
    total, lora = sum(p.parameters for p in parts), cfg.stage.lora
    lines = [part.line() for part in parts]
    if lora is not None:
        kept = "as they are" if lora.quantize is None else f"in 4 bits ({lora.quantize})"
        lines.append(f"stage.lora: adapters of rank {lora.rank} train, the weights of llm are frozen; its maps {kept}")
    return [*lines, f"{'all':<10} {total:>14,} parameters, {trainable:,} {'of them ' * (lora is None)}train"]


def report(
    cfg: TrainConfig,
    config: SkipVisionConfig,
    schedule: PlanSchedule,
    model: SkipVisionForConditionalGeneration,
    parts: Sequence[PartReport],
    arithmetic: BatchArithmetic,
    sample: Sequence[str],
) -> str:
    """The text that ``--dry-run`` prints.

    Args:
        cfg: the validated configuration.
        config: the model's.
        schedule: the stage's plans; the last one is the configuration's.
        model: on any device; its ``requires_grad`` says what trains.
        parts: from ``apply_rates``.
        arithmetic: batch sizes and steps.
        sample: lines about one sample, or why there is none.
    """
    counts = Counter(config.image_token_kinds()) + Counter({TokenKind.TEXT: ASSUMED_TEXT_TOKENS})
    plan, counted = config.plan_or_dense().table().splitlines(), held(model, cfg.stage.lora)
    sections = [
        section("configuration", configuration_lines(cfg)),
        section("batches", [arithmetic.line(), "processes come from WORLD_SIZE, which launchers set"]),
        section("parameters", part_lines(cfg, parts, counted.trainable)),
        section("optimizer groups", group_lines(cfg, model)),
        section("tokens per image", token_lines(config)),
        section("plan", [*plan, *schedule_lines(cfg, schedule, arithmetic.steps)]),
        section("forward pass of one sample", flops_lines(config, counts, 1, schedule, arithmetic.steps)),
        section("memory", memory_lines(cfg, counted, arithmetic.processes)),
        section("first sample", sample),
    ]
    return "\n\n".join(sections) + "\n"


def mark_sample(
    pieces: Sequence[str], kinds: Sequence[TokenKind], supervised: Sequence[bool], is_image: Sequence[bool]
) -> list[str]:
    """A sample as text: supervised runs stand in ``[[ ]]``, runs of placeholders are counted by kind, in their order.

    Args:
        pieces: the text of each position.
        kinds: the kind of each position.
        supervised: whether each position has a label.
        is_image: whether each position is a placeholder.
    """
    parts: list[str] = []
    start = 0
    for i in range(1, len(pieces) + 1):
        if i < len(pieces) and supervised[i] == supervised[start] and is_image[i] == is_image[start]:
            continue
        if is_image[start]:
            counted = Counter(kinds[start:i])
            names = ", ".join(f"{count} {kind.name.lower()}" for kind, count in counted.items())
            parts.append(f"<{i - start} visual tokens: {names}>")
        else:
            run = "".join(pieces[start:i])
            parts.append(f"[[{run}]]" if supervised[start] else run)
        start = i
    text = "".join(parts)
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, WIDTH) or [""]]
    return [*lines, f"{len(pieces)} tokens, {sum(supervised)} supervised (in [[ ]])"]
