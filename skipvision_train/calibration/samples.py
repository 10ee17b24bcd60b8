"""Calibration samples: which records are drawn, and what the model is asked about each of them.

Records of a recipe and prompts of a JSON-lines file are the same type here, for our own model and for everybody's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from skipvision_train.adapters.chat import encode_chats
from skipvision_train.data.collate import collate
from skipvision_train.data.processor import Example, SkipVisionProcessor
from skipvision_train.data.prompts import parse_object, parse_prompt, prompt_lines
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.data.templates import IGNORED
from skipvision_train.errors import ConfigError, DataError, first_line
from skipvision_train.evaluation.evaluate import file_images
from skipvision_train.inference.decoding import on_device
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

T = TypeVar("T")

POSITIONS = ("next", "answer")
"""``next``: the last prompt token. ``answer``: every position that predicts a token of the record's answer."""

LISTED = 12
"""How many task names an error message lists."""

PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""What processors of transformers return beside ``input_ids`` per token, and its value for a token of text."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One record as the model sees it.

    Attributes:
        id: ``<source>/<record id>``, the same in every run.
        task: sub-task that strata and plans go by; "" where the data has none.
        inputs: the model's forward arguments for one row, (1, T) and pixels, on its device.
        read: (1, T) bool on the CPU: the positions whose next-token distribution counts.
    """

    id: str
    task: str
    inputs: dict[str, Tensor]
    read: Tensor


# --- drawing -------------------------------------------------------------------------------------------------------


def draw(
    items: Sequence[T],
    count: int,
    seed: int,
    task_of: Callable[[T], str],
    task: str | None = None,
    stratified: bool = True,
) -> list[T]:
    """``count`` of the items, drawn by ``seed``; the same in every process.

    Tasks take turns, those with most items first (equal ones by name), and within a task the order is a shuffle with a
    seed of its own. So shares differ by one at most, a smaller draw is the beginning of a larger one, and what is drawn
    of a task does not depend on what other tasks hold. One sample of a task is allowed: see
    :func:`refuse_single_samples`.

    Args:
        items: in the order of their files.
        count: how many.
        seed: of the shuffles.
        task_of: an item's sub-task, "" where it has none.
        task: draw from this task alone.
        stratified: False draws from all items alike, whatever their task.

    Raises:
        ConfigError: an unknown task, or fewer items than asked, in all or of one task; with both numbers.
    """
    if count < 1:
        raise ConfigError(f"samples: {count}; at least 1")
    strata: dict[str, list[T]] = {}
    for item in items:
        strata.setdefault(task_of(item), []).append(item)
    if task is not None:
        if task not in strata:
            raise ConfigError(f"task: nothing can be drawn from {task!r}; there {_known(strata)}")
        strata = {task: strata[task]}
    elif not stratified:
        strata = {"": list(items)}
    order = sorted(strata, key=lambda name: (-len(strata[name]), name))
    sizes = [len(strata[name]) for name in order]
    _refuse_too_few(count, order, sizes)
    for name in order:
        random.Random(f"{seed}/calibrate/{name}").shuffle(strata[name])
    turns = (strata[name][i] for i in range(max(sizes)) for name in order if i < len(strata[name]))
    return [next(turns) for _ in range(count)]


def _shares(count: int, strata: int) -> list[int]:
    """``count`` in equal parts; the remainder goes to the first ones."""
    whole, rest = divmod(count, strata)
    return [whole + (i < rest) for i in range(strata)]


def _refuse_too_few(count: int, names: Sequence[str], sizes: Sequence[int]) -> None:
    held = ", ".join(f"{name or 'no task'} {size}" for name, size in zip(names[:LISTED], sizes, strict=False))
    if (total := sum(sizes)) < count:
        parts = f" ({held})" if any(names) else ""
        raise ConfigError(f"samples: {count}, but only {total} can be drawn{parts}; ask for fewer, or give more data")

    def short(wanted: int) -> list[int]:
        return [i for i, share in enumerate(_shares(wanted, len(sizes))) if share > sizes[i]]

    if missing := short(count):
        worst, share = missing[-1], _shares(count, len(sizes))[missing[-1]]
        most = next(n for n in range(count - 1, 0, -1) if not short(n))
        raise ConfigError(
            f"samples: {count} over {len(sizes)} tasks means {share} of {names[worst]!r}, which has {sizes[worst]} "
            f"({held}); ask for {most} at most, for one task, or draw without strata"
        )


def _known(strata: Mapping[str, Sequence[Any]]) -> str:
    names = sorted(name for name in strata if name)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"are {', '.join(names[:LISTED])}{more}" if names else "are no tasks in the data"


def refuse_single_samples(tasks: Sequence[str]) -> None:
    """For whoever makes or compares a plan per task: one sample of ``tasks`` has no variance.

    Raises:
        ConfigError: naming the tasks.
    """
    if single := sorted({task for task in tasks if tasks.count(task) == 1}):
        raise ConfigError(
            f"samples: one of {', '.join(map(repr, single[:LISTED]))}, and one has no variance; draw 2 of every task"
        )


def subtask(record: Record) -> str:
    """What a record's strata and plan go by: its task, "" where it has none."""
    return record.task or ""


# --- records to samples --------------------------------------------------------------------------------------------


def record_samples(
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    records: Sequence[Record],
    positions: str = "next",
) -> list[Sample]:
    """Samples of our own model: the prompt up to the record's last answer, or with that answer appended.

    Args:
        model: gives device and precision.
        processor: the model's.
        records: each with an image.
        positions: of ``POSITIONS``. With ``answer`` the answer and its end token are predicted, teacher forced.

    Raises:
        ConfigError: unknown positions.
        DataError: naming the record: no image, an image that cannot be read, turns that the template cannot express.
    """
    _check(records, positions)
    images_of, samples = file_images(records), []
    for index, record in enumerate(records):
        example = _encoded(processor, record, images_of(index), positions)
        # What is supervised at the end is the last answer with its end token.
        answer = len(list(takewhile(lambda label: label != IGNORED, reversed(example.labels))))
        batch = collate([replace(example, labels=[])], padding_side="left", pad_id=processor.pad_id)
        samples.append(_sample(record, on_device(model, batch), answer))
    return samples


def prompt_samples(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Record], positions: str = "next"
) -> list[Sample]:
    """Samples of a vision-language model of transformers.

    The prompt is written by the processor's chat template; a processor without one gets the texts of the turns, an
    image token for every image. With ``answer`` the answer's own tokens and the tokenizer's end token follow the
    prompt's: nothing is rendered together and searched for.

    Args:
        model: gives device, precision and the image token.
        processor: the model's.
        prompts: each with an image.
        positions: of ``POSITIONS``.

    Raises:
        ConfigError: unknown positions, neither chat template nor image token, or answers and a tokenizer without end
            token.
        DataError: naming the record: no image, an image that cannot be read, no answer, or turns and images that the
            processor cannot write.
    """
    _check(prompts, positions)
    images_of, samples = file_images(prompts), []
    for index, record in enumerate(prompts):
        images = images_of(index)
        try:
            inputs = encode_chats(model, processor, [(record.turns[:-1], images)])
        except ConfigError:
            raise
        except ValueError as error:
            raise DataError(
                f"{_named(record)}: {type(processor).__name__} cannot write it: {first_line(error)}"
            ) from error
        answer = _answer_ids(processor, record) if positions == "answer" else []
        samples.append(_sample(record, on_device(model, _extended(inputs, answer)), len(answer)))
    return samples


def _check(records: Sequence[Record], positions: str) -> None:
    if positions not in POSITIONS:
        raise ConfigError(f"positions: {positions!r} is unknown; use {' or '.join(POSITIONS)}")
    for record in records:
        if not record.images:
            raise DataError(
                f"{_named(record)}: shows no image, so there is no visual computation to measure; leave text-only "
                "records out of the calibration data"
            )


def _named(record: Record) -> str:
    return f"record {record.id} of {record.source}"


def _sample(record: Record, inputs: dict[str, Tensor], answer: int) -> Sample:
    """``answer``: how many tokens at the end are predicted; 0 asks for the token after the last one."""
    read = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    first = read.shape[1] - answer - 1
    read[:, first : first + max(answer, 1)] = True
    return Sample(f"{record.source}/{record.id}", subtask(record), inputs, read)


def _encoded(processor: SkipVisionProcessor, record: Record, images: Sequence[Image.Image], positions: str) -> Example:
    if positions == "answer":
        return processor.encode(record, images)
    try:
        return processor.encode_prompt(record.turns[:-1], images)
    except DataError as error:
        raise DataError(f"{_named(record)}: {error}") from error


def _answer_ids(processor: Any, record: Record) -> list[int]:
    """The answer's tokens and the end token."""
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise ConfigError("positions: 'answer' predicts an end token, and the tokenizer names none; use next")
    text = record.turns[-1].text.strip()
    if not text:
        raise DataError(f"{_named(record)}: 'answer' is empty; positions=answer predicts it")
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _extended(inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """The inputs with tokens of text behind the prompt."""
    extended = dict(inputs)
    for name in ("input_ids", *PER_TOKEN):
        if name in inputs:
            values = ids if name == "input_ids" else [PER_TOKEN[name]] * len(ids)
            extended[name] = torch.cat([inputs[name], inputs[name].new_tensor([values])], dim=1)
    return extended


# --- prompts from a file -------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Record]:
    """Read prompts, an object of :func:`~skipvision_train.data.prompts.parse_prompt` per line.

    Args:
        path: its name without extension becomes the records' source; image paths are relative to its folder.

    Returns:
        Records that show images; the id is the line's number where the file gives none, and an absent answer is an
        empty last turn.

    Raises:
        DataError: naming the file, the line and the field.
    """
    path = Path(path)
    records: dict[str, Record] = {}
    for number, line in prompt_lines(path, "prompts"):
        try:
            record = _parsed(line, number, path)
            if record.id in records:
                raise DataError(f"'id': {record.id!r} is another line's id, too")
        except DataError as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        records[record.id] = record
    if not records:
        raise DataError(f"{path}: holds no prompts")
    return list(records.values())


def _parsed(line: bytes, number: int, path: Path) -> Record:
    prompt = parse_prompt(parse_object(line), path.parent)
    if not prompt.images:
        raise DataError("'image', 'images': both are missing or empty; one of them names the images that are shown")
    identity = str(number if prompt.id is None else prompt.id)
    turns = (*prompt.turns, Turn("assistant", prompt.answer))
    return Record(identity, path.stem, tuple(ImageRef(image) for image in prompt.images), turns, prompt.task)
