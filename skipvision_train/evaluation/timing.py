"""Wall-clock time and cache memory of plans, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn import functional as F

from skipvision_train.evaluation.results import Timing
from skipvision_train.inference.decoding import cache_bytes
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.plan import SkipPlan


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
    output = model(**batch, use_cache=True, logits_to_keep=1)
    prefilled = _now(model.device)
    cache, mask = output.past_key_values, batch["attention_mask"]
    size = cache_bytes(cache)
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
