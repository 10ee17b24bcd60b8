"""``skipvision bench``: what plans cost and what they score, side by side on one's own questions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError
from skipvision_train.files import write_text
from skipvision_train.folders import ResultsFolder

if TYPE_CHECKING:
    from skipvision_train.data.records import Record
    from skipvision_train.evaluation.bench import Wanted
    from skipvision_train.evaluation.bench_results import BenchResult
    from skipvision_train.evaluation.timing import PlanTimes
    from skipvision_train.inference.assistant import Assistant

log = logging.getLogger(__name__)

FILES = ("bench.json", "bench.md", "tradeoff.png", "tradeoff_latency.png")
"""What may be written."""


@dataclass
class Config:
    """Settings of ``skipvision bench``."""

    checkpoint: str = "???"
    """Model directory: ours, or a vision-language model of transformers."""
    recipe: str | None = None
    """Questions: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any."""
    prompts: str | None = None
    """Instead of a recipe: a JSONL file; a line has ``image`` or ``images``, ``prompt``, ``answer``, maybe ``task``."""
    metric: str | None = None
    """How answers are scored where neither the record nor its source names a ``metric``; null is exact match."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; null: the recipe file's own folder."""
    output: str = "???"
    """Folder for ``bench.json``, ``bench.md`` and the pictures."""
    overwrite: bool = False
    """Replace the results of another configuration that stand in ``output``; without it they are refused. The same
    configuration is measured again, and its results are replaced."""
    plans: list[Any] = field(default_factory=list)
    """Rows: each a method, a plan file's path, fields of ``conf/plan`` with ``method`` and maybe ``name``, or a list of
    these that hold together. The dense plan and the model's own are always there."""
    equal_flops: list[float] = field(default_factory=list)
    """Shares of the dense decoder's FLOPs: for each of them a row per method, as strong as comes closest to it."""
    methods: list[str] = field(
        default_factory=lambda: [
            "skip_ffn",
            "skip_kv",
            "vskip",
            "ffn_skip",
            "shortv",
            "vtw",
            "fastv",
            "fastv+vskip",
            "pyramiddrop",
        ]
    )
    """Methods of ``equal_flops``. skip_ffn and skip_kv have one strength, and need tokens that the model lets skip."""
    calibration: str | None = None
    """Folder of a calibration of this model: which layers vskip, ffn_skip and shortv take first; null: the deepest."""
    batch_size: int = 16
    """Records per forward pass; does not change the answers but for rounding in 16 bits."""
    max_new_tokens: int = 32
    """Where an answer without an end is cut."""
    limit: int | None = None
    """At most so many questions of each task, drawn by ``seed``; null asks all."""
    timing: bool = True
    """Time prefill, first token and decoding, all plans in turn."""
    timing_samples: int = 8
    """Questions that are timed, one by one."""
    repeats: int = 5
    """Timed repeats; one more before them is thrown away."""
    decode_tokens: int = 16
    """Tokens that are decoded behind the first one when decoding is timed."""
    seed: int = 0
    """Seeds ``limit`` and resampled intervals."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""


def run(cfg: Config) -> None:
    """Load, choose plans, ask, time; write tables and pictures."""
    check(cfg)
    from skipvision_train.analysis.figures import to_png
    from skipvision_train.analysis.tradeoff import pictures
    from skipvision_train.evaluation.bench_results import markdown
    from skipvision_train.inference.assistant import Assistant

    folder = ResultsFolder.open("bench", cfg, FILES)
    records = read_questions(cfg)
    assistant = Assistant.open(cfg.checkpoint, device=cfg.device, precision=cfg.precision)
    result = bench(cfg, assistant, records)
    with folder.writing() as output:
        result.save(output / "bench.json")
        write_text(output / "bench.md", markdown(result))
        for name, figure in pictures(result).items():
            (output / f"{name}.png").write_bytes(to_png(figure))
    sys.stdout.write(markdown(result))
    log.info("wrote %s", folder.path / "bench.json")


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.evaluation.equal_flops import METHODS

    for name in ("batch_size", "max_new_tokens", "timing_samples", "repeats", "decode_tokens"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name}: {getattr(cfg, name)}; at least 1")
    if (cfg.recipe is None) == (cfg.prompts is None):
        raise ConfigError("recipe: give either recipe=... or prompts=... (a JSONL file)")
    for share in cfg.equal_flops:
        if not 0 < share < 1:
            raise ConfigError(f"equal_flops: {share}; shares of the dense FLOPs, above 0 and below 1")
    if unknown := [name for name in cfg.methods if name not in METHODS]:
        raise ConfigError(f"methods: {unknown[0]!r} is unknown; use some of {', '.join(METHODS)}")
    named_plans(cfg.plans)


def named_plans(plans: Sequence[Any]) -> dict[str, list[PlanSpec]]:
    """The rows of ``plans`` by name, each as the parts that hold together; without ``name`` its fields are the name.

    Raises:
        ConfigError: an entry that is no plan, or two of one name.
    """
    found: dict[str, list[PlanSpec]] = {}
    for place, entry in enumerate(plans):
        parts = entry if isinstance(entry, list) else [entry]
        if not parts:
            raise ConfigError(f"plans[{place}]: [] names no plan; give methods, plan files or fields of a plan")
        names, specs = zip(*(_read_part(part, f"plans[{place}]") for part in parts), strict=True)
        name = " + ".join(names)
        if name in found:
            raise ConfigError(f"plans[{place}]: {name!r} is another row, too; give one of them a 'name'")
        if name not in ("dense", "own"):
            found[name] = list(specs)
    return found


def _read_part(part: Any, where: str) -> tuple[str, PlanSpec]:
    """One part's name, and the plan that it names."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(part, str):
        is_file = part.endswith(".json")
        return part, PlanSpec("file", path=part) if is_file else PlanSpec(part)
    if not isinstance(part, dict):
        raise ConfigError(
            f"{where}: {part!r} is no plan; give a method, a plan file or fields such as {{method: vskip}}"
        )
    fields = {key: value for key, value in part.items() if key != "name"}
    if "method" not in fields:
        raise ConfigError(f"{where}: {fields} lacks 'method'; give {{method: vskip, count: 2}}, say")
    try:
        spec: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanSpec), fields))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from error
    return str(part.get("name", _described(spec))), spec


def read_questions(cfg: Config) -> list[Record]:
    """The questions, each with a right answer and what its metric needs.

    Raises:
        ConfigError: an unknown metric, or ``limit`` out of range.
        DataError: the data cannot be read, or a record cannot be scored.
    """
    from skipvision_train.calibration.samples import read_jsonl
    from skipvision_train.commands.evaluate import limit_per_task
    from skipvision_train.data.recipes import load_recipe, load_records
    from skipvision_train.errors import DataError
    from skipvision_train.evaluation.evaluate import task_of
    from skipvision_train.evaluation.tasks import check_targets, with_metric

    if cfg.prompts is not None:
        found = read_jsonl(cfg.prompts)
        if missing := [record.id for record in found if not record.turns[-1].text.strip()]:
            raise DataError(
                f"{cfg.prompts}: prompt {missing[0]}: 'answer' is missing; without it nothing can be scored"
            )
    else:
        found = load_records(load_recipe(str(cfg.recipe), cfg.data_root)).read_all()
    records = with_metric(found, cfg.metric)
    check_targets(records, task_of)
    return limit_per_task(records, cfg.limit, cfg.seed)


def bench(cfg: Config, assistant: Assistant, records: Sequence[Record]) -> BenchResult:
    """Choose the plans, ask the questions, take the times."""
    from skipvision_train.evaluation.bench import ask_plans, assemble

    wanted = rows(cfg, assistant, records)
    log.info("%d questions under %d plans on %s", len(records), len(wanted), assistant.model.device)
    plans = {name: row.plan for name, row in wanted.items()}
    answers = ask_plans(assistant, plans, records, cfg.batch_size, cfg.max_new_tokens)
    times = take_times(cfg, assistant, wanted, records) if cfg.timing else {}
    return assemble(assistant, wanted, records, answers, times, facts_of(cfg, assistant), cfg.seed)


def rows(cfg: Config, assistant: Assistant, records: Sequence[Record]) -> dict[str, Wanted]:
    """The rows by name: dense, the model's own plan, those of the configuration, those at equal FLOPs.

    Raises:
        ConfigError: a plan that cannot be built, its row named.
    """
    from skipvision_train.errors import PlanError
    from skipvision_train.evaluation.bench import Wanted
    from skipvision_train.evaluation.bench_results import BASELINE
    from skipvision_train.plans.methods import dense
    from skipvision_train.plans.plan import compose

    depth = assistant.own_plan.num_layers
    found = {BASELINE: Wanted(dense().bind(depth), "nothing skipped")}
    if not assistant.own_plan.is_dense:
        found["own"] = Wanted(assistant.own_plan, f"the model's own: {assistant.own_plan.name}")
    for name, parts in named_plans(cfg.plans).items():
        try:
            plans = [assistant.planned(spec) for spec in parts]
            plan = plans[0] if len(plans) == 1 else compose(plans)
            with assistant.under(plan):  # refuses what the model cannot run before anything is asked
                pass
        except (ConfigError, PlanError) as error:
            raise ConfigError(f"plans: {name}: {error}") from error
        settings = (
            each.name if spec.method == "file" else _described(spec) for spec, each in zip(parts, plans, strict=True)
        )
        found[name] = Wanted(plan, " + ".join(settings))
    plans = [row.plan for row in found.values()]
    equal = {name: row for name, row in equal_rows(cfg, assistant, records).items() if row.plan not in plans}
    if twice := sorted(set(found) & set(equal)):
        raise ConfigError(f"plans: equal_flops makes a row {twice[0]!r}, too; give yours another 'name'")
    return found | equal


def _described(spec: PlanSpec) -> str:
    given = {key: value for key, value in vars(spec).items() if value is not None and key != "method"}
    return " ".join([spec.method, *(f"{key}={value}" for key, value in given.items())])


def equal_rows(cfg: Config, assistant: Assistant, records: Sequence[Record]) -> dict[str, Wanted]:
    """A row per method and share of ``equal_flops``; methods without anything to leave out have none."""
    if not cfg.equal_flops:
        return {}
    from skipvision_train.evaluation.bench import Wanted, conversation_of, kind_counts, mean_prompt
    from skipvision_train.evaluation.equal_flops import at_share, layer_orders
    from skipvision_train.models.identity import model_hash
    from skipvision_train.plans.families import find_decoder

    model = assistant.model
    depth = assistant.own_plan.num_layers
    digest = None if cfg.calibration is None else model_hash(model)
    orders = layer_orders(depth, cfg.calibration, digest)
    step = max(1, len(records) // COUNTED)
    prompts = [prompt_counts(assistant, conversation_of(record)) for record in records[::step]]
    counts = kind_counts(mean_prompt(prompts))
    found: dict[str, Wanted] = {}
    for share in cfg.equal_flops:
        for method in cfg.methods:
            choice = at_share(method, share, find_decoder(model).config, counts, orders)
            if choice is None:
                log.info("%s has nothing to leave out of these prompts", method)
                continue
            name = method if len(cfg.equal_flops) == 1 else f"{method} at {share:g}"
            if any(row.plan == choice.plan for row in found.values()):
                continue  # it has the same strength at another share
            found[name] = Wanted(choice.plan, choice.setting)
    return found


COUNTED = 50
"""Prompts that are counted to choose strengths; what a row costs is counted over all."""


def prompt_counts(assistant: Assistant, conversation: Any) -> Mapping[str, int]:
    """Positions of a prompt per kind, lower-case names."""
    from collections import Counter

    from skipvision_train.plans.rules import TokenKind

    counts = Counter(assistant.kinds(assistant.encode([conversation]))[0].tolist())
    return {kind.name.lower(): counts[kind] for kind in TokenKind if kind != TokenKind.PAD and counts[kind]}


def take_times(
    cfg: Config, assistant: Assistant, wanted: Mapping[str, Wanted], records: Sequence[Record]
) -> dict[str, PlanTimes]:
    """The times of all rows on the first questions."""
    from skipvision_train.evaluation.bench import conversation_of
    from skipvision_train.evaluation.timing import measure_answers

    batches = [assistant.encode([conversation_of(record)]) for record in records[: cfg.timing_samples]]
    log.info("timing %d prompts, %d repeats", len(batches), cfg.repeats)
    return measure_answers(
        assistant, batches, {name: row.plan for name, row in wanted.items()}, cfg.repeats, cfg.decode_tokens
    )


def facts_of(cfg: Config, assistant: Assistant) -> dict[str, Any]:
    """What a reader needs to know about the run."""
    from skipvision_train.evaluation.bench import device_name
    from skipvision_train.inference.loading import package_versions

    model = assistant.model
    facts = {
        "checkpoint": cfg.checkpoint,
        "model": type(model).__name__,
        "data": cfg.recipe or cfg.prompts,
        "device": device_name(model.device),
        "precision": str(model.dtype).removeprefix("torch."),
        "versions": package_versions(),
        "seed": cfg.seed,
    }
    if cfg.calibration is not None:
        facts["calibration"] = cfg.calibration
    if cfg.timing:
        facts["times"] = (
            f"median (fastest to slowest) of {cfg.repeats} repeats, plans in turn, {cfg.timing_samples} prompts one by "
            f"one, {cfg.decode_tokens} tokens decoded"
        )
    return facts
