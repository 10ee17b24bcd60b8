"""Wall-clock time and cache memory of plans, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from skipvision_train.evaluation.results import Timing
from skipvision_train.inference.decoding import Sampling, generate
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.cache import bytes_held, growing_cache
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan

if TYPE_CHECKING:
    from skipvision_train.inference.assistant import Assistant


def measure_plans(
    model: SkipVisionForConditionalGeneration,
    batches: Sequence[Mapping[str, Tensor]],
    plans: Mapping[str, SkipPlan],
    repeats: int = 5,
    decode_tokens: int = 8,
) -> dict[str, Timing]:
    """Time prefill and decoding under every plan.

    All plans run on a batch before the next batch, in alternating order, so that a machine that warms up or is shared
    with others treats them alike. One repeat before the measured ones is thrown away. The model's own plan is restored.

    Args:
        model: in evaluation mode, on the device that is to be timed.
        batches: left-padded prompts; times are per batch, so give one row each for times per sample.
        plans: by name.
        repeats: measured repeats; the median over them counts, the mean over batches.
        decode_tokens: tokens fed back one by one after each prefill.

    Raises:
        ValueError: no batches, no repeats or no tokens to decode.
    """
    if not batches or repeats < 1 or decode_tokens < 1:
        raise ValueError(
            f"timing needs at least one batch, repeat and token; got {len(batches)}, {repeats} and {decode_tokens}"
        )
    runs: dict[str, list[list[tuple[float, float, int]]]] = {name: [[] for _ in batches] for name in plans}
    base = model.plan
    try:
        for repeat in range(repeats + 1):
            for index, batch in enumerate(batches):
                for name in list(plans)[:: 1 if (repeat + index) % 2 == 0 else -1]:
                    model.set_plan(plans[name])
                    run = _run(model, batch, decode_tokens)
                    if repeat:
                        runs[name][index].append(run)
    finally:
        model.set_plan(base)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return {
        name: Timing(
            prefill_ms=fmean(median(run[0] for run in batch) for batch in results),
            decode_ms=fmean(median(run[1] for run in batch) for batch in results),
            kv_bytes=sum(batch[0][2] for batch in results) / rows,
        )
        for name, results in runs.items()
    }


@torch.no_grad()
def _run(
    model: SkipVisionForConditionalGeneration, batch: Mapping[str, Tensor], decode_tokens: int
) -> tuple[float, float, int]:
    """Milliseconds of the prefill and of one decoding step, and the cache's bytes after the prefill."""
    start = _now(model.device)
    cache, mask = growing_cache(model.config), batch["attention_mask"]
    output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefilled = _now(model.device)
    size = bytes_held(cache)
    resumed = _now(model.device)
    for _ in range(decode_tokens):
        mask = F.pad(mask, (0, 1), value=1)
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return 1000 * (prefilled - start), 1000 * (_now(model.device) - resumed) / decode_tokens, size


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """A time in milliseconds over repeats: the median, and the fastest and slowest repeat."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per repeat."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class PlanTimes:
    """What a plan costs on one machine, per batch; of batches of one row each, per sample.

    Attributes:
        prefill_ms: one forward pass over the prompt, the images' encoder included.
        first_token_ms: from the call of ``generate`` to the first token.
        decode_ms: each further token of ``generate``.
        kv_bytes: keys and values of all layers after the last token, as allocated, mean per row.
    """

    prefill_ms: Spread
    first_token_ms: Spread
    decode_ms: Spread
    kv_bytes: float


def measure_answers(
    assistant: Assistant,
    batches: Sequence[Mapping[str, Tensor]],
    plans: Mapping[str, SkipPlan],
    repeats: int = 5,
    decode_tokens: int = 16,
) -> dict[str, PlanTimes]:
    """Time plans on any model, as users run it: prefill, first token and further tokens of ``generate``.

    All plans run on a batch before the next batch, in alternating order; the first repeat is thrown away. A repeat's
    time is the mean over batches. The assistant's plan is restored.

    Args:
        assistant: on the device that is to be timed.
        batches: as :meth:`Assistant.encode` makes them.
        plans: by name.
        repeats: measured ones.
        decode_tokens: generated behind the first one, whatever the model says.

    Raises:
        ValueError: no batches, no repeats or no tokens to decode.
    """
    if not batches or repeats < 1 or decode_tokens < 1:
        raise ValueError(
            f"timing needs at least one batch, repeat and token; got {len(batches)}, {repeats} and {decode_tokens}"
        )
    former = assistant.plan
    runs: dict[str, list[list[tuple[float, float, float, int]]]] = {name: [] for name in plans}
    try:
        for repeat in range(repeats + 1):
            found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in plans}
            for index, batch in enumerate(batches):
                for name in list(plans)[:: 1 if (repeat + index) % 2 == 0 else -1]:
                    assistant.use(plans[name])
                    found[name].append(_timed_answer(assistant, batch, decode_tokens))
            if repeat:
                for name, measured in found.items():
                    runs[name].append(measured)
    finally:
        assistant.use(former)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    times = {}
    for name, done in runs.items():
        prefill, first, decode = (Spread.of([fmean(run[k] for run in repeat) for repeat in done]) for k in range(3))
        times[name] = PlanTimes(prefill, first, decode, sum(run[3] for run in done[0]) / rows)
    return times


@torch.no_grad()
def _timed_answer(
    assistant: Assistant, batch: Mapping[str, Tensor], decode_tokens: int
) -> tuple[float, float, float, int]:
    """Milliseconds of a bare prefill, to the first token and of each further one, and the cache's bytes at the end."""
    model = assistant.model
    never = find_decoder(model).embed_tokens.num_embeddings  # a token that is none, so that no answer ends early
    start = _now(model.device)
    model(**batch, use_cache=True, logits_to_keep=1)
    prefill = 1000 * (_now(model.device) - start)
    found = generate(model, batch, Sampling(decode_tokens + 1), [never], assistant.pad_id)
    assert found.decode_ms is not None
    return prefill, found.first_token_ms, found.decode_ms, found.kv_bytes
