"""Plans side by side on one model and the same questions: scores, what they cost, how long they take."""

from __future__ import annotations

import logging
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipvision_train.analysis.flops import KindCounts, kv_cache_bytes, live_counts, sequence_flops
from skipvision_train.data.images import load_image
from skipvision_train.data.records import IMAGE_MARKER, Record
from skipvision_train.evaluation.bench_results import BASELINE, BenchResult, Cost, Difference, Row
from skipvision_train.evaluation.bootstrap import Array, resampled_sums
from skipvision_train.evaluation.evaluate import task_of
from skipvision_train.evaluation.results import Prediction, Scores
from skipvision_train.evaluation.tasks import METRICS, Target, target_of
from skipvision_train.evaluation.timing import PlanTimes
from skipvision_train.inference.assistant import Assistant
from skipvision_train.inference.conversation import Conversation
from skipvision_train.inference.decoding import Sampling
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, TokenKind

log = logging.getLogger(__name__)

# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        predictions: per plan, a scored answer per record.
        prompts: per record, its prompt's positions per kind, lower-case names.
    """

    predictions: Mapping[str, Sequence[Prediction]]
    prompts: Sequence[Mapping[str, int]]


def conversation_of(record: Record) -> Conversation:
    """A record up to its last question, with its images decoded."""
    images = tuple(load_image(image, record.id) for image in record.images)
    return Conversation(record.turns[:-1], images)


def ask_plans(
    assistant: Assistant,
    plans: Mapping[str, SkipPlan],
    records: Sequence[Record],
    batch_size: int,
    max_new_tokens: int,
) -> Answers:
    """Answer the last question of every record under every plan, and score the answers.

    A batch is encoded once and asked under all plans before the next one. Answers are greedy, or the likeliest of the
    record's choices where its metric says so; they do not depend on ``batch_size`` but for rounding in 16 bits. The
    assistant's plan is restored.

    Args:
        assistant: any model.
        plans: by name.
        records: the last turn of each is the right answer.
        batch_size: records per forward pass.
        max_new_tokens: where an answer without an end is cut.

    Raises:
        ConfigError: an unknown metric, or a model that cannot pad several prompts.
        DataError: an image that cannot be read, or a record without what its metric needs.
    """
    targets = [target_of(record) for record in records]
    found: dict[str, dict[int, Prediction]] = {name: {} for name in plans}
    prompts: dict[int, dict[str, int]] = {}
    former = assistant.plan
    by_kind = [
        [i for i, t in enumerate(targets) if METRICS[t.metric].by_likelihood == wanted] for wanted in (False, True)
    ]
    chunks = [rows[start : start + batch_size] for rows in by_kind for start in range(0, len(rows), batch_size)]
    try:
        for number, rows in enumerate(chunks, 1):
            conversations = [conversation_of(records[row]) for row in rows]
            inputs = assistant.encode(conversations)
            for row, kinds in zip(rows, assistant.kinds(inputs).tolist(), strict=True):
                counts = Counter(kinds)
                prompts[row] = {k.name.lower(): counts[k] for k in TokenKind if k != TokenKind.PAD and counts[k]}
            by_likelihood = METRICS[targets[rows[0]].metric].by_likelihood
            for name, plan in plans.items():
                assistant.use(plan)
                if by_likelihood:
                    texts = _likeliest(assistant, conversations, [targets[row] for row in rows], batch_size)
                else:
                    texts = [reply.text for reply in assistant.answer(inputs, Sampling(max_new_tokens))]
                for row, text in zip(rows, texts, strict=True):
                    found[name][row] = _prediction(text, records[row], targets[row])
            if number % 10 == 0:
                log.info("asked %d of %d batches under %d plans", number, len(chunks), len(plans))
    finally:
        assistant.use(former)
    order = range(len(records))
    return Answers({name: [own[row] for row in order] for name, own in found.items()}, [prompts[row] for row in order])


def _likeliest(
    assistant: Assistant, conversations: Sequence[Conversation], targets: Sequence[Target], batch_size: int
) -> list[str]:
    """Of every question's choices the one that is the likeliest answer; of equal ones the first."""
    found = assistant.log_likelihoods(conversations, [target.choices for target in targets], batch_size)
    best = [max(range(len(row)), key=lambda i, row=row: row[i].log_prob) for row in found]  # type: ignore[misc]
    return [target.choices[index] for target, index in zip(targets, best, strict=True)]


def _prediction(text: str, record: Record, target: Target) -> Prediction:
    verdict = METRICS[target.metric].judge(text, target)
    return Prediction(
        record_id=record.id,
        task=task_of(record),
        images=(),
        question=record.turns[-2].text.replace(IMAGE_MARKER, "").strip(),
        answer=record.turns[-1].text,
        output=text,
        score=verdict.score,
        metric=target.metric,
        category=target.category,
        group=target.group,
        read=verdict.read,
    )


# --- differences ---------------------------------------------------------------------------------------------------


def differences(
    questions: Sequence[tuple[str, str]], scores: Mapping[str, Sequence[float]], baseline: str, seed: int = 0
) -> dict[str, Difference]:
    """Of every row's mean score over tasks to the baseline's: the same questions, so their difficulty cancels out.

    Questions are resampled within their task, the same ones for all rows (percentile bootstrap). Rows that score every
    question alike differ by exactly nothing. Of MME the mean of single questions counts here, not its own score.

    Args:
        questions: id and task of each.
        scores: per row, one score per question.
        baseline: a row.
        seed: of the draws.
    """
    names, tasks = list(scores), sorted({task for _, task in questions})
    table = np.array([scores[name] for name in names], dtype=np.float64).T - np.array(scores[baseline])[:, None]
    means: list[Array] = []
    for task in tasks:
        rows = [i for i, (_, own) in enumerate(questions) if own == task]
        means.append(resampled_sums(table[rows], seed, task) / len(rows))
    mean = np.mean(means, axis=0)
    bounds = np.percentile(mean[1:], (2.5, 97.5), axis=0)
    return {
        name: Difference(float(mean[0, k]), float(bounds[0, k]), float(bounds[1, k])) for k, name in enumerate(names)
    }


# --- cost ----------------------------------------------------------------------------------------------------------


def kind_counts(prompt: Mapping[str, float]) -> dict[TokenKind, float]:
    """Counts by lower-case name to counts by kind."""
    return {TokenKind[name.upper()]: count for name, count in prompt.items()}


def mean_prompt(prompts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Positions per kind of a mean prompt; kinds that never occur are left out."""
    totals: Counter[str] = Counter()
    for prompt in prompts:
        totals.update(prompt)
    return {
        kind.name.lower(): totals[kind.name.lower()] / len(prompts) for kind in TokenKind if totals[kind.name.lower()]
    }


def plan_cost(assistant: Assistant, prompts: Sequence[Mapping[str, int]], plan: SkipPlan) -> Cost:
    """Mean over prompts; equal ones are counted once."""
    model = assistant.model
    text, size = find_decoder(model).config, model.dtype.itemsize
    nothing = dense().bind(plan.num_layers)
    different = Counter(tuple(sorted(prompt.items())) for prompt in prompts)
    sums: dict[str, float] = defaultdict(float)
    live: dict[str, float] = defaultdict(float)
    for prompt, times in different.items():
        counts = kind_counts(dict(prompt))
        sums["flops"] += times * sequence_flops(text, counts, plan).total
        sums["dense"] += times * sequence_flops(text, counts, nothing).total
        sums["kv"] += times * kv_cache_bytes(text, counts, plan, size)
        for own, rule in zip(live_counts(counts, plan), plan.rules, strict=True):
            for kind, count in own.items():
                live[kind.name.lower()] += times * count
            sums["queries"] += times * _visual(own, rule.no_attention)
            sums["ffn"] += times * _visual(own, rule.no_ffn)
        sums["pairs"] += times * plan.num_layers * _visual(counts)
    number, pairs = len(prompts), sums["pairs"] or 1
    return Cost(
        flops=sums["flops"] / number,
        share=sums["flops"] / sums["dense"],
        kv_bytes=sums["kv"] / number,
        live={name: count / number / plan.num_layers for name, count in live.items()},
        visual_queries=sums["queries"] / pairs,
        visual_ffn=sums["ffn"] / pairs,
    )


def _visual(counts: KindCounts, without: frozenset[TokenKind] = frozenset()) -> float:
    return sum(count for kind, count in counts.items() if kind in VISUAL and kind not in without)


# --- all of it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A row that is to be measured: its plan, and what it does in words."""

    plan: SkipPlan
    setting: str = ""


def assemble(
    assistant: Assistant,
    wanted: Mapping[str, Wanted],
    records: Sequence[Record],
    answers: Answers,
    times: Mapping[str, PlanTimes],
    facts: Mapping[str, Any],
    seed: int = 0,
) -> BenchResult:
    """Scores, differences and costs of answers that were given.

    Args:
        assistant: that gave them.
        wanted: the rows, ``dense`` among them.
        records: the questions.
        answers: under every row's plan.
        times: of rows that were timed.
        facts: about the run.
        seed: of the resampling.
    """
    questions = tuple((record.id, task_of(record)) for record in records)
    scores = {name: [p.score for p in answers.predictions[name]] for name in wanted}
    apart = differences(questions, scores, BASELINE, seed)
    texts = {name: [p.output for p in answers.predictions[name]] for name in wanted}
    rows = []
    for name, row in wanted.items():
        found = Scores.of(answers.predictions[name], seed)
        other = sum(a != b for a, b in zip(texts[name], texts[BASELINE], strict=True))
        rows.append(
            Row(
                name=name,
                setting=row.setting,
                plan=row.plan,
                mean=found.mean,
                tasks=found.tasks,
                difference=apart[name],
                changed=other / len(records),
                cost=plan_cost(assistant, answers.prompts, row.plan),
                times=times.get(name),
                scores=tuple(scores[name]),
            )
        )
    return BenchResult(facts, mean_prompt(answers.prompts), questions, tuple(rows))


def device_name(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
