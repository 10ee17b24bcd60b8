"""Which metric scores a record's answer, what the metric needs of the record, and the score of one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skipvision_train.data.formats import answer_texts
from skipvision_train.data.records import Record
from skipvision_train.data.strict_json import kind
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.evaluation.choices import read_letter, right_option
from skipvision_train.evaluation.metrics import exact_match
from skipvision_train.evaluation.text_scores import anls, contains_answer, relaxed_match
from skipvision_train.evaluation.vqa import AGREEING, vqa_accuracy
from skipvision_train.evaluation.yes_no import COGNITION, PERCEPTION, label_of, read_mme, read_pope, says_yes_or_no

DEFAULT_METRIC = "exact_match"

JUDGED = {
    "mathvista": "MathVista reads answers with a language model",
    "mm_vet": "MM-Vet grades answers with a language model",
    "llava_bench": "LLaVA-Bench grades answers with a language model",
}
"""Metrics that need another model as a judge, which this program does not call."""


@dataclass(frozen=True)
class Target:
    """What one record's answer is scored by.

    Attributes:
        metric: a key of ``METRICS``.
        answers: right answers; of several people for VQA accuracy, otherwise each is right by itself.
        choices: texts of the options of a multiple-choice question, in order.
        category: part of the benchmark (POPE's splits, the subtasks of MME and OCRBench).
        group: what belongs together: MME scores the two questions about one image together.
    """

    metric: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    category: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The score of one answer.

    Attributes:
        score: in [0, 1].
        read: what the metric took the answer for (a letter, yes or no); empty if it found none, None if the metric
            takes the text as it is.
    """

    score: float
    read: str | None = None


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        judge: an answer and what is right, to a verdict.
        check: raises ValueError for a target that the metric cannot score.
        graded: scores lie between 0 and 1, not only at the ends.
        by_likelihood: nothing is generated; the likeliest of the choices is the answer.
        several: ``answers`` of a record count; without it the record's last turn alone is right.
    """

    judge: Callable[[str, Target], Verdict]
    check: Callable[[Target], None] = lambda target: None
    graded: bool = False
    by_likelihood: bool = False
    several: bool = False


def _exact(output: str, target: Target) -> Verdict:
    return Verdict(float(any(exact_match(output, answer) for answer in target.answers)))


def _vqa(output: str, target: Target) -> Verdict:
    return Verdict(vqa_accuracy(output, target.answers))


def _anls(output: str, target: Target) -> Verdict:
    return Verdict(anls(output, target.answers))


def _relaxed(output: str, target: Target) -> Verdict:
    return Verdict(float(any(relaxed_match(output, answer) for answer in target.answers)))


def _letter(output: str, target: Target) -> Verdict:
    read = read_letter(output, target.choices)
    right = right_option(target.answers[0], target.choices, letter_first=True)
    return Verdict(float(read is not None and ord(read) - ord("A") == right), read or "")


def _likeliest(output: str, target: Target) -> Verdict:
    right = target.choices[right_option(target.answers[0], target.choices, letter_first=False)]
    return Verdict(float(output == right))


def _pope(output: str, target: Target) -> Verdict:
    read = read_pope(output)
    return Verdict(float(read == label_of(target.answers[0])), read if says_yes_or_no(output) else "")


def _mme(output: str, target: Target) -> Verdict:
    read = read_mme(output)
    return Verdict(float(read == label_of(target.answers[0])), read or "")


def _ocrbench(output: str, target: Target) -> Verdict:
    return Verdict(float(contains_answer(output, target.answers, target.category)))


def _needs_people(target: Target) -> None:
    if len(target.answers) <= AGREEING:
        raise ValueError(f"'answers' has {len(target.answers)}; one of each person is needed, the VQA challenge has 10")


def _needs_option(target: Target) -> None:
    right_option(target.answers[0], target.choices, letter_first=True)


def _needs_choices(target: Target) -> None:
    if len(set(target.choices)) < 2 or len(set(target.choices)) < len(target.choices):
        raise ValueError(f"'choices' has {len(target.choices)}; at least 2 different texts are needed")
    if not all(choice.strip() for choice in target.choices):
        raise ValueError("'choices' holds an empty text")
    right_option(target.answers[0], target.choices, letter_first=False)


def _needs_label(target: Target) -> None:
    label_of(target.answers[0])


def _needs_pair(target: Target) -> None:
    label_of(target.answers[0])
    if (target.category or "").lower() not in (*PERCEPTION, *COGNITION):
        raise ValueError(
            f"'category' is {target.category!r:.80}; MME has {', '.join(PERCEPTION)} and {', '.join(COGNITION)}"
        )
    if target.group is None:
        raise ValueError("'group' is missing: the two questions about one image need the same text there")


METRICS: dict[str, Metric] = {
    "exact_match": Metric(_exact, several=True),
    "vqa_accuracy": Metric(_vqa, _needs_people, graded=True, several=True),
    "anls": Metric(_anls, graded=True, several=True),
    "relaxed_accuracy": Metric(_relaxed, several=True),
    "multiple_choice": Metric(_letter, _needs_option),
    "multiple_choice_likelihood": Metric(_likeliest, _needs_choices, by_likelihood=True),
    "yes_no": Metric(_pope, _needs_label),
    "mme": Metric(_mme, _needs_pair),
    "ocrbench": Metric(_ocrbench, several=True),
}
"""By the name that recipes and records use."""


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: unknown, or one that another model has to judge.
    """
    if name in JUDGED:
        raise ConfigError(
            f"metric {name!r}: {JUDGED[name]}; evaluate by exact_match for the answers and hand evaluation.json to the "
            "benchmark's own judge, or use lmms-eval"
        )
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} is unknown; use one of {', '.join(METRICS)}")
    return METRICS[name]


def with_metric(records: Sequence[Record], name: str | None) -> list[Record]:
    """The records, those that name no metric with this one; None leaves them.

    Raises:
        ConfigError: no such metric.
    """
    if name is None:
        return list(records)
    metric_named(name)
    return [replace(record, extras={"metric": name, **record.extras}) for record in records]


def target_of(record: Record) -> Target:
    """What the record's last answer is scored by.

    Raises:
        ConfigError: an unknown metric.
        DataError: the record lacks what its metric needs, or has it in another form; the message names the record.
    """
    try:
        name = _text(record.extras, "metric") or DEFAULT_METRIC
        target = _read_target(record, name, metric_named(name).several)
        METRICS[name].check(target)
    except (ValueError, DataError) as error:
        if isinstance(error, ConfigError):
            raise
        name = record.extras.get("metric", DEFAULT_METRIC)
        raise DataError(f"record {record.id} of {record.source}, metric {name}: {error}") from error
    return target


def _read_target(record: Record, metric: str, several: bool) -> Target:
    extras = record.extras
    answers = answer_texts(extras["answers"]) if several and "answers" in extras else [record.turns[-1].text]
    group = _text(extras, "group")
    if group is None and record.images and all(image.is_file for image in record.images):
        group = ", ".join(map(str, record.images))
    if not all(answer.strip() for answer in answers):
        raise DataError("'answers' holds an empty text")
    return Target(metric, tuple(answers), _texts(extras, "choices"), _text(extras, "category"), group)


def _text(extras: Any, name: str) -> str | None:
    value = extras.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise DataError(f"{name!r} must be a text, found {kind(value)}")
    return None if value is None else str(value)


def _texts(extras: Any, name: str) -> tuple[str, ...]:
    value = extras.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value) or len(value) > 26:
        raise DataError(f"{name!r} must be a list of at most 26 texts, found {kind(value)}")
    return tuple(value)


def check_targets(records: Sequence[Record], task_of: Callable[[Record], str]) -> None:
    """Refuse, before a model is asked, what could not be scored afterwards.

    Raises:
        ConfigError: an unknown metric.
        DataError: :func:`target_of`, two metrics in one task, or a group of MME without two questions.
    """
    metrics: dict[str, str] = {}
    groups: dict[tuple[str, str | None, str | None], int] = {}
    for record in records:
        target, task = target_of(record), task_of(record)
        if metrics.setdefault(task, target.metric) != target.metric:
            raise DataError(
                f"task {task!r}: record {record.id} of {record.source} is scored by {target.metric}, others by "
                f"{metrics[task]}; give records of one metric a task of their own"
            )
        if target.metric == "mme":
            key = (task, target.category, target.group)
            groups[key] = groups.get(key, 0) + 1
    for (task, category, group), count in groups.items():
        if count != 2:
            raise DataError(f"task {task!r}, {category}: {count} questions in group {group!r}; MME has 2 per image")
