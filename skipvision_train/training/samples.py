"""Answers of the model that trains to a few fixed samples, so that a person sees what the loss does not say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipvision_train.data.collate import collate
from skipvision_train.data.images import load_image
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Record
from skipvision_train.errors import DataError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.callbacks import append_lines

log = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"


@dataclass(frozen=True, eq=False)
class HeldSample:
    """A prompt and what should come.

    Attributes:
        record: ``id of source``.
        question: the user's last words.
        answer: the record's.
        prompt: a batch of one.
    """

    record: str
    question: str
    answer: str
    prompt: dict[str, Tensor]


def held_samples(
    records: Sequence[Record], processor: SkipVisionProcessor, template: str, count: int
) -> list[HeldSample]:
    """``count`` samples, evenly spread over ``records``; one that cannot be used is passed over."""
    found = []
    for place in (i * len(records) // count for i in range(min(count, len(records)))):
        try:
            record = records[place]
            images = [load_image(image, f"{record.id} of {record.source}") for image in record.images]
            last = max(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
            example = processor.encode_prompt(record.turns[:last], images, template)
        except DataError as error:
            log.warning("no answer will be shown for a sample: %s", error)
            continue
        question, answer = record.turns[last - 1].text, record.turns[last].text
        prompt = collate([example], "left", processor.pad_id)
        found.append(HeldSample(f"{record.id} of {record.source}", question, answer, prompt))
    return found


class SampleTables(TrainerCallback):
    """Every so many steps, and after the last one, lets the model answer; greedily, so that nothing random is used up.

    Under ZeRO-3 every process answers, because the weights are gathered by all; else the first one alone.

    Args:
        model: the model itself.
        processor: its.
        samples: what to answer.
        every: steps.
        tokens: longest answer.
        path: of the JSON-lines file.
        together: all processes take part.
        tell: gets step and rows, on the first process.
        begin: called with ``samples`` before and ``other`` behind.
    """

    def __init__(
        self,
        model: SkipVisionForConditionalGeneration,
        processor: SkipVisionProcessor,
        samples: Sequence[HeldSample],
        every: int,
        tokens: int,
        path: Path,
        together: bool = False,
        tell: Callable[[int, Sequence[dict[str, Any]]], None] | None = None,
        begin: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.processor, self.samples = model, processor, tuple(samples)
        self.every, self.tokens, self.path = every, tokens, path
        self.together, self.tell, self.begin = together, tell, begin

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a table where one is due."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        if not (self.together or state.is_world_process_zero):
            return
        if self.begin is not None:
            self.begin("samples")
        rows = [self._row(sample, state.global_step, args.device) for sample in self.samples]
        if state.is_world_process_zero:
            append_lines(self.path, rows)
            if self.tell is not None:
                self.tell(state.global_step, rows)
        if self.begin is not None:
            self.begin("other")

    def _row(self, sample: HeldSample, step: int, device: torch.device) -> dict[str, Any]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                prompt = {key: value.to(device) for key, value in sample.prompt.items()}
                model: Any = self.model
                ids = model.generate(**prompt, max_new_tokens=self.tokens, do_sample=False, synced_gpus=self.together)
        finally:
            self.model.train(was_training)
        said = self.processor.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return asdict(Row(step, sample.record, sample.question, sample.answer, str(said)))


@dataclass(frozen=True)
class Row:
    """A line of ``samples.jsonl``."""

    step: int
    record: str
    question: str
    answer: str
    prediction: str
