"""What a model answered, and what that took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens and outer white space.
        finished: the model ended it; False: it was cut at ``max_new_tokens``, or stopped.
        tokens: generated ones, the ending one included.
        prompt: positions of the prompt per kind, lower-case names; kinds that do not occur are left out.
        first_token_ms: from the call to the first token: encoded images and prefill.
        decode_ms: per further token; None where there is none.
        kv_bytes: memory of keys and values at the end, of this row alone.

    In a batch the times are the batch's.
    """

    text: str
    finished: bool
    tokens: int
    prompt: Mapping[str, int]
    first_token_ms: float
    decode_ms: float | None
    kv_bytes: float
