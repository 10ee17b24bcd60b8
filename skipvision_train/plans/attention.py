"""Attention in which some tokens issue no query, and the masks that go with it.

Shapes as in ``stages.py``, and: M asking tokens of the batch, Q of the row with most, K keys of a row, C hidden width,
H query heads, G key heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision_train.errors import PlanError
from skipvision_train.plans.stages import Queries

Kernel = Callable[[Any, Tensor, Tensor, Tensor, Queries], Tensor]
"""``(attention module, query (M, H, D), key (B, K, G, D), value (B, K, G, D), queries) -> (M, H, D)``.

Under autocast queries and keys may be fp32 (the rotation makes them so) and values half precision.
"""


def rotary_function(attention: Any) -> Any:
    """The ``apply_rotary_pos_emb`` that the attention module's own code uses, or None where there is none."""
    for cls in type(attention).__mro__:
        function = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None


def rotate_rows(attention: Any, rows: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
    """Rotate packed ``rows`` (N, heads, D) by their cos and sin, (N, D) each, with the model's own function."""
    # It rotates a query and a key of one length; the key here is a tensor without heads.
    return rotary_function(attention)(rows, rows[:, :0], *rotary)[0]


def normed_heads(attention: Any, asking: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (M, H, D) of ``asking`` (M, C) and keys (N, G, D) of ``normed`` (N, C), before rotation."""
    query = attention.q_proj(asking).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key


def attend(
    attention: Any,
    normed: Tensor,
    queries: Queries,
    rotary: tuple[Tensor, Tensor],
    batch: int,
    past_key_values: Any | None,
    kernel: Kernel,
) -> Tensor:
    """Attention output of the tokens that ask; keys and values come from (and are cached for) every live token.

    Args:
        attention: the layer's ``self_attn`` with ``q_proj, k_proj, v_proj, o_proj`` and, if it has them, per-head
            ``q_norm`` and ``k_norm``.
        normed: (N, C), the packed live tokens, normed.
        queries: who asks and what they see.
        rotary: cos and sin, (N, D) each, of the live tokens.
        batch: B.
        past_key_values: the cache, or None.
        kernel: what computes softmax attention.

    Returns:
        (M, C), in the order of ``queries.index``.
    """
    index = queries.index
    asking = normed if index is None else normed.index_select(0, index)
    query, key = normed_heads(attention, asking, normed)
    query_rotary = rotary if index is None else tuple(part.index_select(0, index) for part in rotary)
    query, key = rotate_rows(attention, query, query_rotary), rotate_rows(attention, key, rotary)
    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    if queries.grid is not None:
        key, value = key.index_select(0, queries.grid), value.index_select(0, queries.grid)
    key, value = key.unflatten(0, (batch, -1)), value.unflatten(0, (batch, -1))
    if past_key_values is not None:
        key, value = _cached(past_key_values, key, value, attention.layer_idx)

    attended = kernel(attention, query, key, value, queries)
    return attention.o_proj(attended.flatten(1))


def _cached(cache: Any, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Put keys and values (B, K, G, D) into the cache; what attention then sees.

    That is what the cache held before and the new ones. An empty cache of a fixed size would give its unused places
    too, a quantised one rounded values: the new ones are all there is to see.
    """
    before = cache.get_seq_length(layer)
    keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), layer)
    if not before:
        return key, value
    return keys.transpose(1, 2), values.transpose(1, 2)


def query_grid(query: Tensor, queries: Queries, batch: int) -> Tensor:
    """The packed queries (M, H, D) as (B, H, Q, D), with zeros in unused places."""
    if queries.slots is not None:
        query = query.new_zeros(batch * queries.width, *query.shape[1:]).index_copy(0, queries.slots, query)
    return query.unflatten(0, (batch, queries.width)).transpose(1, 2)


def packed_rows(attended: Tensor, queries: Queries) -> Tensor:
    """What stands at the queries' places of (B, H, Q, D), as (M, H, D)."""
    rows = attended.transpose(1, 2).flatten(0, 1)
    return rows if queries.slots is None else rows.index_select(0, queries.slots)


def sdpa(attention: Any, query: Tensor, key: Tensor, value: Tensor, queries: Queries) -> Tensor:
    """torch's scaled dot product attention: the reference, on every device."""
    query, key, value = query_grid(query, queries, len(key)), key.transpose(1, 2), value.transpose(1, 2)
    grouped = query.shape[1] != key.shape[1]
    if queries.mask is not None and grouped:
        # With a mask, enable_gqa would send CUDA to the unfused kernel; repeated keys keep the memory-efficient one.
        groups, grouped = query.shape[1] // key.shape[1], False
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=queries.mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        is_causal=queries.mask is None and queries.causal,
        scale=attention.scaling,
        enable_gqa=grouped,
    )
    return packed_rows(attended, queries)


def add_rows(hidden: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """``hidden`` (N, C) with ``update`` (M, C) added at ``rows`` (M,); differentiable."""
    changed = (hidden.index_select(0, rows) + update).to(hidden.dtype)
    return hidden.index_copy(0, rows, changed)


class _PutRows(torch.autograd.Function):
    """``index_copy`` that keeps its index to itself."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        ctx.rows = rows
        return tokens.index_copy(0, rows, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        return gradient.index_fill(0, ctx.rows, 0), None, gradient.index_select(0, ctx.rows)


def put_rows(tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``tokens`` (N, C) with ``values`` (M, C) at ``rows`` (M,), each at most once; differentiable.

    The last step of a layer in which tokens skip. Nothing is saved for its backward pass by autograd's own means: under
    gradient checkpointing, what asks for a saved tensor recomputes the layer at once, and ZeRO-3 would then fetch its
    weights in another order than on a rank whose batch has no token that skips, and wait for ever.
    """
    result: Tensor = _PutRows.apply(tokens, rows, values)
    return result


def backend_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """``visible`` (B, T, K) bool as the mask that a transformers attention backend understands.

    Raises:
        PlanError: a backend that takes no such mask (flash attention, for more than one query).
    """
    if implementation == "sdpa":
        return visible[:, None]
    if implementation == "eager":  # adds its mask to the scores: True would count as +1
        visible = visible[:, None]
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
    if implementation == "flash_attention_2" and visible.shape[1] == 1:  # takes the padding, and the rest is causal
        return visible[:, 0].long()
    raise PlanError(
        f"attention implementation {implementation!r} takes no mask of its own, which packed documents and a step onto "
        "a filled or evicted KV cache need; load the language model with attn_implementation='sdpa' or 'eager'"
    )
