"""One calibration from drawn samples to chosen plans; what ``skipvision calibrate`` runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipvision_train.adapters.apply import visual_token_ids
from skipvision_train.adapters.prompts import PromptReader
from skipvision_train.calibration import search
from skipvision_train.calibration.ranks import Ranks
from skipvision_train.calibration.samples import (
    Sample,
    draw,
    prompt_samples,
    record_samples,
    refuse_single_samples,
    subtask,
)
from skipvision_train.calibration.scores import (
    STRATEGIES,
    ScoreTable,
    check_finite,
    layer_values,
    plan_divergences,
    random_ranks,
)
from skipvision_train.calibration.sweep import SweepOptions
from skipvision_train.data.records import Record
from skipvision_train.errors import ConfigError
from skipvision_train.files import read_json, write_json
from skipvision_train.inference.loading import load_model
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan, compose
from skipvision_train.plans.rules import DENSE_RULE, TokenKind

if TYPE_CHECKING:
    from skipvision_train.commands.calibrate import Config

log = logging.getLogger(__name__)

UNIVERSAL = ""
"""The key of the plan for every task."""

SOURCES = ("recipe", "prompts", "data_root", "image_token_id")
"""Fields beside the ids of the samples that say what these are: the same ids may stand in other files."""


@dataclass(frozen=True)
class Found:
    """What a calibration found.

    Attributes:
        table: every layer's score on every sample.
        plans: the universal one under ``""``; one per task besides for a bank or a transfer matrix.
        kl: per measured plan (samples,) float64, nats: the divergence of the base model from it as a whole, on all
            samples. They chose it, or of a bank those of the task that ``universal`` names.
    """

    table: ScoreTable
    plans: Mapping[str, SkipPlan]
    kl: Mapping[str, Tensor]

    @property
    def cost(self) -> search.Estimate:
        """The divergence that the universal plan costs, which the scores of its layers do not add up to."""
        return search.Estimate.of(self.kl[UNIVERSAL])

    def transfer(self) -> dict[str, Any]:
        """Mean divergence of every task's plan on every task's samples, as the report reads it."""
        tasks = sorted(set(self.plans) - {UNIVERSAL})
        columns = [[i for i, own in enumerate(self.table.tasks) if own == task] for task in tasks]
        rows = [[float(self.kl[task][own].mean()) for own in columns] for task in tasks]
        return {"calibrated_on": tasks, "evaluated_on": tasks, "kl": rows, "samples": "those that chose the plans"}


@dataclass
class Session:
    """A model, the drawn records, and this process's share of the samples.

    Attributes:
        cfg: the settings.
        ranks: which process this is.
        model: under ``base``.
        model_hash: tells models apart.
        base: the plan that holds besides; ours as it was trained, dense for others.
        ids, tasks: of all samples, in order.
        own: this process's samples.
        drawn: per draw, the ids of its samples.
        kind_counts: positions of each kind, mean over all processes' samples.
    """

    cfg: Config
    ranks: Ranks
    model: PreTrainedModel
    model_hash: str
    base: SkipPlan
    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    own: list[Sample]
    drawn: list[list[str]]
    kind_counts: dict[TokenKind, float]

    @classmethod
    def open(cls, cfg: Config, ranks: Ranks, records: Sequence[Record]) -> Session:
        """Draw from ``records``, load the model, and make this process's samples.

        Raises:
            ConfigError: too few records, an unknown task, a depth that the budget exceeds, or a plan of the model whose
                eviction the positions would have to show.
            CheckpointError: the model cannot be loaded.
            DataError: a record without an image, or with a broken one.
        """
        draws = [draw_once(cfg, records, cfg.seed + i) for i in range(cfg.draws)]
        union = list({record_id(r): r for drawn in draws for r in drawn}.values())
        check_tasks(cfg, tuple(map(subtask, union)))
        loaded: tuple[Any, Any, bool] = load_model(cfg.checkpoint, cfg.device, cfg.precision)
        model, processor, is_ours = loaded
        depth = len(find_decoder(model).layers)
        base = model.plan if is_ours else dense().bind(depth)
        check_budget(cfg, depth)
        check_eviction(cfg, base)
        make: Any = record_samples if is_ours else prompt_samples
        own = make(model, processor, ranks.share(union), cfg.positions)
        return cls(
            cfg,
            ranks,
            model,
            model_hash(model),
            base,
            tuple(map(record_id, union)),
            tuple(map(subtask, union)),
            own,
            [[record_id(r) for r in drawn] for drawn in draws],
            mean_kinds(model, own, cfg.image_token_id, ranks),
        )

    # --- scoring ---------------------------------------------------------------------------------------------------

    def score(self, strategy: str | None = None, base: SkipPlan | None = None, resume: bool = True) -> ScoreTable:
        """The scores of all samples, from all processes; goes on with what an interrupted run has left behind.

        Raises:
            ConfigError: a score that is no number, or finished layers of another calibration.
        """
        name, base = strategy or self.cfg.strategy.name, base or self.base
        store = Partial(self._partial, self._key(name, base), self.cfg.overwrite) if resume else None
        bar = ProgressBar(self.ranks.rank == 0)
        options = SweepOptions(
            image_token_id=self.cfg.image_token_id,
            max_rows=self.cfg.max_rows,
            done=self.ranks.told(store.read) if store else None,
            keep=store.keep if store and self.ranks.rank == 0 else None,
            progress=bar,
            exchange=self.ranks.join,
        )
        if STRATEGIES[name].divergence is None:
            values = random_ranks(base.num_layers, self.cfg.seed)[:, None].repeat(1, len(self.ids))
        else:
            values = layer_values(self.model, self.own, name, self.cfg.strategy.bypass, base, options)
        bar.close()
        check_finite(values, self.ids)
        return ScoreTable(name, self.cfg.strategy.bypass, values, self.ids, self.tasks)

    def _key(self, strategy: str, base: SkipPlan) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "model": self.model_hash,
            "base": base.to_dict(),
            "strategy": strategy,
            "bypass": cfg.strategy.bypass,
            "positions": cfg.positions,
            **{name: getattr(cfg, name) for name in SOURCES},
            "samples": list(self.ids),
        }

    # --- choosing --------------------------------------------------------------------------------------------------

    def run(self) -> Found:
        """Score, choose, and measure what the chosen plans cost as a whole."""
        table = self.score()
        plans = self.choose(table)
        kl = self.divergences(plans if self.cfg.transfer else {UNIVERSAL: plans[UNIVERSAL]})
        return Found(table, plans, kl)

    def forget(self) -> None:
        """Delete the finished layers, when what was found is written."""
        self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        """Where finished layers wait for a run that goes on."""
        return Path(self.cfg.output) / "partial.json"

    def divergences(self, plans: Mapping[str, SkipPlan]) -> dict[str, Tensor]:
        """Per plan (samples,) float64, from all processes: KL(P under the base plan || P under it), in nats."""
        distinct = list(dict.fromkeys(plans.values()))
        own = plan_divergences(self.model, self.own, distinct, self.base, self.cfg.image_token_id)
        found = {plan: self.ranks.join(values) for plan, values in zip(distinct, own, strict=True)}
        return {name: found[plan] for name, plan in plans.items()}

    def choose(self, table: ScoreTable) -> dict[str, SkipPlan]:
        """The universal plan (under ``""``) and, for a bank or a transfer matrix, one per task."""
        cfg = self.cfg
        if cfg.strategy.search != "top":
            return {UNIVERSAL: self._searched(cfg.strategy.search)}
        tasks = sorted(set(self.tasks)) if cfg.bank or cfg.transfer else []
        scores: dict[str, Tensor] = {task: table.mean(task) for task in tasks}
        scores[UNIVERSAL] = self.universal_scores(table)
        return {task: self.plan(search.count_for(own, cfg.budget.layers())) for task, own in scores.items()}

    def universal_scores(self, table: ScoreTable) -> Tensor:
        """(layers,) float64: what the universal plan is chosen by; its samples' mean, or as ``universal`` says."""
        return search.universal(table, self.cfg.universal) if self.cfg.bank else table.mean()

    def plan(self, layers: Sequence[int]) -> SkipPlan:
        """The base plan with the strategy's rule in ``layers``."""
        rule = STRATEGIES[self.cfg.strategy.name].rule(self.cfg.strategy.bypass)
        added = SkipPlan("V-Skip", tuple(rule if i in layers else DENSE_RULE for i in range(self.base.num_layers)))
        if rule.no_ffn:
            added = replace(added, name=self.cfg.strategy.name)
        name = added.name if self.base.is_dense else f"{self.base.name} + {added.name}"
        return compose([self.base, added], name)

    def _searched(self, how: str) -> SkipPlan:
        strategy, budget = self.cfg.strategy, self.cfg.budget
        if how == "greedy":
            rule = STRATEGIES[strategy.name].rule(strategy.bypass)
            count = len(search.count_for([0.0] * self.base.num_layers, budget.layers()))
            return search.greedy(lambda plan: self.score(base=plan, resume=False).mean(), self.base, rule, count).plan
        parts = {"attention": "vig", "ffn": "vig_ffn"}
        return search.joint(
            lambda plan, part: self.score(parts[part], plan, resume=False).mean(),
            self.base,
            float(budget.flops or 0),
            text_config=find_decoder(self.model).config,
            kind_counts=self.kind_counts,
            rules=search.part_rules(strategy.bypass),
            rescore=strategy.rescore,
        ).plan


def record_id(record: Record) -> str:
    """``<source>/<id>``: what a sample is called in tables and provenance."""
    return f"{record.source}/{record.id}"


def draw_once(cfg: Config, records: Sequence[Record], seed: int) -> list[Record]:
    """One draw: ``samples`` records, for a bank of every task."""
    if not cfg.bank:
        return draw(records, cfg.samples, seed, subtask, cfg.task)
    tasks = sorted({subtask(record) for record in records})
    if tasks == [""]:
        raise ConfigError("bank: the data name no tasks, so there is nothing to hold one plan each; leave bank out")
    return [record for task in tasks for record in draw(records, cfg.samples, seed, subtask, task)]


def check_tasks(cfg: Config, tasks: Sequence[str]) -> None:
    """Refuse drawn samples whose tasks cannot have a plan each, where one is asked for.

    Raises:
        ConfigError: naming the tasks or the field.
    """
    if not (cfg.bank or cfg.transfer):
        return
    refuse_single_samples(tasks)
    names = sorted(set(tasks))
    if cfg.transfer and len(names) < 2:
        raise ConfigError(f"transfer: compares the plans of several tasks; all samples are of {names[0] or 'no task'}")
    if cfg.bank and cfg.universal not in ("pooled", *names):
        raise ConfigError(
            f"universal: no sample has the task {cfg.universal!r}; use pooled or one of {', '.join(names)}"
        )


def check_budget(cfg: Config, depth: int) -> None:
    """Refuse a count above the depth before anything is measured."""
    if cfg.budget.count is not None and cfg.budget.count > depth:
        raise ConfigError(f"budget.count: {cfg.budget.count}; the model has {depth} layers, use 0 to {depth}")


def check_eviction(cfg: Config, base: SkipPlan) -> None:
    """Refuse plans that the scores would not show: these come from forwards without a KV cache, which evict nothing.

    Raises:
        ConfigError: the base plan evicts before the first token, or before other positions that are read.
    """
    kinds = ", ".join(sorted(kind.name.lower() for kind in base.evict))
    if kinds and base.evict_when == "before_first_token":
        raise ConfigError(
            f"checkpoint: {cfg.checkpoint} has the plan {base.name!r}, by which {kinds} leave the KV cache "
            "before_first_token, and samples run without a cache; save it with a plan of evict_when=after_first_token"
        )
    if kinds and cfg.positions == "answer":
        raise ConfigError(
            f"positions: 'answer', but under the plan {base.name!r} of {cfg.checkpoint} {kinds} leave the KV cache "
            "behind the first token, and samples run without a cache; use next"
        )


def mean_kinds(
    model: Any, samples: Sequence[Sample], image_token_id: int | None, ranks: Ranks | None = None
) -> dict[TokenKind, float]:
    """How many positions of each kind a sample has, mean over the samples of all processes.

    The same on every process: a search that counts FLOPs must take the same steps everywhere.
    """
    found = [_kinds(model, sample.inputs, image_token_id) for sample in samples]
    ranks = ranks or Ranks()
    own = {kind: torch.tensor([int((kinds == kind).sum()) for kinds in found]).double() for kind in TokenKind}
    return {kind: float(ranks.join(counts).mean()) for kind, counts in own.items()}


def _kinds(model: Any, inputs: Mapping[str, Tensor], image_token_id: int | None) -> Tensor:
    """(1, T) int64 :class:`TokenKind` of one prompt."""
    if isinstance(model, SkipVisionForConditionalGeneration):
        return inputs["token_kinds"]
    return PromptReader(visual_token_ids(model, image_token_id)).kinds(inputs["input_ids"])


class Partial:
    """The finished layers of a run that may be interrupted, in a file that names what they belong to.

    Args:
        path: of the file.
        key: what they belong to, as JSON values.
        overwrite: begin anew where the file is another calibration's.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.key, self.overwrite = path, dict(key), overwrite
        self.layers: dict[str, list[float]] = {}

    def read(self) -> dict[int, Tensor]:
        """The finished layers of the same calibration.

        Raises:
            ConfigError: they are another one's, and not to be overwritten.
        """
        if not self.path.is_file():
            return {}
        found = read_json(self.path)
        key = json.loads(json.dumps(self.key))
        if differing := [name for name in key if found["key"].get(name) != key[name]]:
            if not self.overwrite:
                raise ConfigError(
                    f"output: {self.path} has finished layers of an interrupted calibration that differs in "
                    f"{', '.join(differing)}; name another output=..., or begin anew with overwrite=true"
                )
            log.info("%s belongs to another calibration; starting anew", self.path)
            return {}
        self.layers = found["layers"]
        log.info("%s: going on after %d finished layers", self.path, len(self.layers))
        return {int(layer): torch.tensor(values, dtype=torch.float64) for layer, values in self.layers.items()}

    def keep(self, layer: int, values: Tensor) -> None:
        """Note a finished layer."""
        self.layers[str(layer)] = values.tolist()
        write_json(self.path, {"key": self.key, "layers": self.layers})


class ProgressBar:
    """Layers done and the time that is left, on a terminal only."""

    def __init__(self, shown: bool) -> None:
        from tqdm import tqdm

        self._bar = partial(tqdm, desc="layers", unit="layer", disable=None if shown else True)
        self._running: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._running is None:
            self._running = self._bar(total=total)
        self._running.update(done - self._running.n)

    def close(self) -> None:
        """Leave the line."""
        if self._running is not None:
            self._running.close()
