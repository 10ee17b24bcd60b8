"""Prompts of a file to answers in a file: in batches, in order, and on from where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from skipvision_train.data.images import load_image
from skipvision_train.data.prompts import Prompt, parse_object, parse_prompt, prompt_id, prompt_lines
from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.files import read_json, write_json
from skipvision_train.inference.assistant import Assistant
from skipvision_train.inference.conversation import Conversation
from skipvision_train.inference.decoding import Sampling
from skipvision_train.inference.replies import Reply
from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)

BATCHES_SORTED = 4
"""Prompts of so many batches are sorted by length before they are cut into batches: rows of like length waste little
padding. An interrupted run loses at most their answers."""

IMAGE_LENGTH = 2_000
"""How much text an image counts as when prompts are sorted."""


@dataclass(frozen=True)
class Question:
    """A line of the input.

    Attributes:
        line: its number, from 1.
        id: the record's, or the line's number where it has none; None if the line cannot even be read.
        prompt: what is asked; None if the line is no prompt.
        error: why it is none.
    """

    line: int
    id: str | int | None
    prompt: Prompt | None
    error: str | None = None

    @property
    def length(self) -> int:
        """Roughly, in characters."""
        if self.prompt is None:
            return 0
        return sum(len(turn.text) for turn in self.prompt.turns) + IMAGE_LENGTH * len(self.prompt.images)


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        answered: prompts that were answered now.
        kept: lines of the output that an earlier run wrote.
        errors: error lines in the output, an earlier run's among them.
        tokens: generated now.
    """

    answered: int
    kept: int
    errors: int
    tokens: int


def read_questions(path: Path, system: str | None = None) -> Iterator[Question]:
    """The prompts of a JSON-lines file, in order, those that are none with their reason.

    Args:
        path: read as it is iterated over; image paths are relative to its folder.
        system: stands before prompts that bring no system message.

    Raises:
        DataError: the file cannot be read.
    """
    seen: set[str] = set()
    for number, raw in prompt_lines(path, "input"):
        identity: str | int | None = None
        try:
            entry = parse_object(raw)
            given = prompt_id(entry)
            identity = number if given is None else given
            if str(identity) in seen:
                raise DataError(f"'id': {identity!r} is another line's id, too")
            seen.add(str(identity))
            prompt = parse_prompt(entry, path.parent)
        except DataError as error:
            yield Question(number, identity, None, str(error))
            continue
        if system is not None and prompt.turns[0].role != "system":
            prompt = Prompt(
                prompt.id, (Turn("system", system), *prompt.turns), prompt.images, prompt.answer, prompt.task
            )
        yield Question(number, identity, prompt)


class AnswerFile:
    """The output: a JSON object per line, appended; beside it ``<name>.run.json`` with what the answers depend on.

    Args:
        path: of the output; a half line at its end, which an interrupted run leaves, is cut off.
        settings: what answers depend on, as JSON values; a run goes on only under the same.

    Attributes:
        kept: how many lines were there.
        errors: how many error lines are there, written ones included.

    Raises:
        ConfigError: the file was begun under other settings, or by something else.
        DataError: a line of it is none of ours.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._answered: set[str] = set()
        self._failed: set[tuple[str, int]] = set()
        self.kept = 0
        self.errors = 0
        beside = path.with_name(path.name + ".run.json")
        if path.is_dir():
            raise ConfigError(f"output: {path} is a folder; name a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                self._check_settings(beside, settings)
                self._resume()
            else:
                write_json(beside, dict(settings))
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output: {path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, question: Question) -> bool:
        """Whether its line is there."""
        if question.prompt is None:  # of two lines with one id the second is none, so ids do not tell them apart
            return (str(question.id), question.line) in self._failed
        return str(question.id) in self._answered

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        self.errors += "error" in line

    def _check_settings(self, beside: Path, settings: Mapping[str, Any]) -> None:
        if not beside.is_file():
            raise ConfigError(
                f"output: {self.path} was not begun by this command: there is no {beside.name}; name another file"
            )
        former = read_json(beside)
        for name, value in settings.items():
            if former.get(name) != value:
                raise ConfigError(
                    f"output: {self.path} was begun with {name} {former.get(name)}, now it is {value}; name another "
                    f"file, or delete it and {beside.name}"
                )

    def _resume(self) -> None:
        with self.path.open("rb+") as file:
            end = 0
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    log.warning("%s: a half line at the end is cut off", self.path)
                    file.truncate(end)
                    break
                end += len(raw)
                self._note(raw, number)

    def _note(self, raw: bytes, number: int) -> None:
        try:
            line = parse_object(raw)
            if "error" in line:
                self._failed.add((str(line["id"]), int(line["line"])))
                self.errors += 1
            if line["id"] is not None:
                self._answered.add(str(line["id"]))
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"output: {self.path}: line {number} is none of this command's: {error}") from error
        self.kept += 1


def answer_file(
    assistant: Assistant,
    questions: Iterable[Question],
    answers: AnswerFile,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    plan_of: Callable[[str | None], SkipPlan] | None = None,
    stops: bool = False,
    details: bool = False,
    total: int | None = None,
) -> Summary:
    """Answer all questions whose lines are not there, and write the lines in the order of the questions.

    Args:
        assistant: keeps its plan.
        questions: all of the input.
        answers: the output.
        sampling: how tokens are chosen; with a seed and a temperature the draws depend on the batch.
        batch_size: prompts that run together.
        plan_of: a task's plan; None: all run under the assistant's.
        stops: raise at the first question that cannot be answered, in place of an error line.
        details: times and memory in every line.
        total: how many questions there are, for the bar.

    Raises:
        DataError: with ``stops``, naming the line and the reason.
        ConfigError: the model cannot run batches.
    """
    choose = plan_of or (lambda task: assistant.plan)
    counts = {"answered": 0, "tokens": 0}
    open_questions = (question for question in questions if not answers.has(question))
    bar = tqdm(desc="answers", unit="prompt", total=total, initial=answers.kept, disable=None)  # quiet in logs
    with bar:
        while group := list(islice(open_questions, batch_size * BATCHES_SORTED)):
            lines = _Lines(group, answers, stops)
            bar.update(lines.flush())
            for plan, batch in _batches(group, choose, batch_size):
                with assistant.under(plan):
                    found = _answered(assistant, batch, sampling)
                for question, result in zip(batch, found, strict=True):
                    if isinstance(result, Reply):
                        counts["answered"] += 1
                        counts["tokens"] += result.tokens
                    lines.ready[question.line] = _line(question, result, details)
                bar.update(lines.flush())
    return Summary(counts["answered"], answers.kept, answers.errors, counts["tokens"])


@dataclass
class _Lines:
    """Lines of a group that wait until those before them are there."""

    group: Sequence[Question]
    answers: AnswerFile
    stops: bool
    written: int = 0
    ready: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for question in self.group:
            if question.error is not None:
                self.ready[question.line] = _line(question, question.error, details=False)

    def flush(self) -> int:
        """Write what can be written; how many lines."""
        before = self.written
        while self.written < len(self.group) and (number := self.group[self.written].line) in self.ready:
            line = self.ready.pop(number)
            if self.stops and "error" in line:
                raise DataError(f"input: line {number}: {line['error']}")
            self.answers.write(line)
            self.written += 1
        return self.written - before


def _batches(
    group: Sequence[Question], choose: Callable[[str | None], SkipPlan], size: int
) -> Iterator[tuple[SkipPlan, list[Question]]]:
    """Prompts of like length and the same plan, long ones first: a lack of memory shows at once."""
    by_plan: list[tuple[SkipPlan, list[Question]]] = []
    for question in sorted(group, key=lambda question: -question.length):
        if question.prompt is None:
            continue
        plan = choose(question.prompt.task)
        same = next((members for known, members in by_plan if known == plan), None)
        if same is None:
            by_plan.append((plan, [question]))
        else:
            same.append(question)
    for plan, members in by_plan:
        for start in range(0, len(members), size):
            yield plan, members[start : start + size]


def _answered(assistant: Assistant, batch: Sequence[Question], sampling: Sampling) -> list[Reply | str]:
    """For every prompt its reply, or why there is none."""
    found: list[Reply | str | Conversation] = [_opened(question) for question in batch]
    places = [i for i, result in enumerate(found) if isinstance(result, Conversation)]
    asked = [result for result in found if isinstance(result, Conversation)]
    for place, result in zip(places, _asked(assistant, asked, sampling), strict=True):
        found[place] = result
    return [result for result in found if not isinstance(result, Conversation)]


def _opened(question: Question) -> Conversation | str:
    assert question.prompt is not None
    try:
        images = tuple(load_image(path, f"{question.id!s:.80}") for path in question.prompt.images)
    except DataError as error:
        return str(error)
    return Conversation(question.prompt.turns, images)


def _asked(assistant: Assistant, conversations: Sequence[Conversation], sampling: Sampling) -> list[Reply | str]:
    """One reply each; a batch that cannot run is halved until what cannot is alone."""
    if not conversations:
        return []
    try:
        return list(assistant.replies(conversations, sampling))
    except DataError as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = f"too little memory: {str(error).splitlines()[0]}"
    # Outside of the handler: the exception's frames hold the tensors that did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(conversations) == 1:
        return [reason]
    middle = len(conversations) // 2
    halves = (conversations[:middle], conversations[middle:])
    return [reply for half in halves for reply in _asked(assistant, half, sampling)]


def _line(question: Question, result: Reply | str, details: bool) -> dict[str, Any]:
    if isinstance(result, str):
        return {"id": question.id, "line": question.line, "error": result}
    line: dict[str, Any] = {
        "id": question.id,
        "answer": result.text,
        "finished": result.finished,
        "tokens": result.tokens,
        "prompt_tokens": dict(result.prompt),
    }
    if details:
        line |= {
            "first_token_ms": result.first_token_ms,
            "decode_ms": result.decode_ms,
            "kv_bytes": result.kv_bytes,
        }
    return line


def plan_digest(plans: Iterable[SkipPlan]) -> str:
    """A short text that differs if any of the plans does in what it leaves out."""
    known = [plan.to_dict() for plan in plans]
    parts = [{key: value for key, value in plan.items() if key not in ("name", "provenance")} for plan in known]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_settings(
    checkpoint: str, source: Path, sampling: Sampling, system: str | None, **others: Any
) -> dict[str, Any]:
    """What the answers of a file depend on, as JSON values."""
    return {
        "checkpoint": str(Path(checkpoint).resolve()),
        "input": str(source.resolve()),
        "system": system,
        **asdict(sampling),
        **others,
    }
