"""Greedy and sampled decoding by transformers' ``generate``, with a clock, a way to stop, and text as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from skipvision_train.errors import ConfigError
from skipvision_train.plans.cache import bytes_held, growing_cache

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding shows for the first bytes of a character whose other bytes are still to come."""

_OF_THE_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")

NEUTRAL: dict[str, Any] = {
    **{
        name: value
        for name, value in GenerationConfig().to_dict().items()
        if name not in _OF_THE_MODEL and not name.startswith("_")
    },
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}
"""Arguments of transformers' ``generate`` that leave a model's ``generation_config.json`` no say in which token is
taken: penalties, guidance, beams, forbidden and forced tokens, stop strings, its own cache. What ends an answer and
what fills up rows it still says."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: where an answer without an end is cut.
        temperature: 0 takes the likeliest token every time.
        top_p: with a temperature: draw among the likeliest tokens that together have this share.
        top_k: with a temperature: draw among so many tokens at most; 0 among all.
        seed: of the draws; None draws anew every time.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 for the likeliest token, or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 for all, or above"),
        )
        for name, fits, right in checks:
            if not fits:
                raise ConfigError(f"{name}: {getattr(self, name)}; {right}")

    def arguments(self) -> dict[str, Any]:
        """Of transformers' ``generate``, all that choose tokens: the model's own settings do not count."""
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**NEUTRAL, "max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Generated:
    """The raw result of a batch of B prompts.

    Attributes:
        tokens: (B, N) int64, what was generated; rows that ended are filled up with the padding token.
        first_token_ms: until the first tokens of all rows.
        decode_ms: per step after it; None without any.
        kv_bytes: of the whole cache at the end.
    """

    tokens: Tensor
    first_token_ms: float
    decode_ms: float | None
    kv_bytes: int


@dataclass
class _Watch(BaseStreamer):
    """Notes when tokens come, and hands them on; ``generate`` sends the prompt first."""

    on_tokens: Callable[[Tensor], None] | None = None
    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        if self.times and self.on_tokens is not None:
            self.on_tokens(value)
        self.times.append(time.perf_counter())  # generate has just copied the tokens to the CPU: the device is done

    def end(self) -> None:
        """Nothing is held back."""


class _Stopped(StoppingCriteria):
    """Ends all rows when asked to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)


def on_device(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device, pixels in the model's precision."""
    return {
        key: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for key, value in batch.items()
    }


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    sampling: Sampling,
    end_ids: list[int],
    pad_id: int,
    on_tokens: Callable[[Tensor], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generated:
    """Answer a batch.

    Args:
        model: one of transformers', in evaluation mode.
        inputs: left-padded prompts on its device.
        sampling: how tokens are chosen.
        end_ids: the tokens that end an answer.
        pad_id: what fills up rows that ended before others.
        on_tokens: is given each step's (B,) tokens on the CPU.
        stopped: asked after every step; True ends the answer there.
    """
    watch = _Watch(on_tokens)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    found = model.generate(
        **inputs,
        **{**sampling.arguments(), "return_dict_in_generate": True},
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        past_key_values=growing_cache(model.config),
        streamer=watch,
        stopping_criteria=StoppingCriteriaList([] if stopped is None else [_Stopped(stopped)]),
    )
    _, first, *later = watch.times
    return Generated(
        tokens=found.sequences[:, inputs["input_ids"].shape[1] :].cpu(),
        first_token_ms=1000 * (first - start),
        decode_ms=1000 * (later[-1] - first) / len(later) if later else None,
        kv_bytes=bytes_held(found.past_key_values),
    )


class TextPieces:
    """Tokens of one answer, one by one, to pieces of text that together are the answer's text.

    A character of several tokens comes when it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that ``token`` completes; often empty."""
        self._ids.append(token)
        text = self._text()
        if text.endswith(UNFINISHED):
            return ""
        return self._take(text)

    def rest(self) -> str:
        """What no further token will complete."""
        return self._take(self._text())

    def _text(self) -> str:
        # White space in front is never shown; at the end it may turn out to be inside.
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _take(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new
