"""Attention in which some tokens issue no query, and the masks that go with it.

Shapes: B batch rows, T sequence positions, N active queries of the whole batch, Q the most active queries of one row,
K cached and new keys, C hidden width, H heads, D head width. A *flat* position is ``row * T + column``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision_train.errors import PlanError
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.plan import Kinds, TokenKind


@dataclass(frozen=True)
class ActiveQueries:
    """Which positions issue a query, for one set of kinds that does not. Built once per forward, used by many layers.

    Attributes:
        rows: (N,) int64, flat positions with a query, ascending.
        slots: (N,) int64, where each of them stands in the padded (B, Q) grid of queries: ``row * Q + rank in row``.
        bypassed: (M,) int64, flat positions of the kinds without a query (padding is in neither list).
        mask: (B, 1, Q, K) bool, True where the query may attend to the key. Unused slots see every key, so that no row
            of the softmax is empty.
    """

    rows: Tensor
    slots: Tensor
    bypassed: Tensor
    mask: Tensor


def select_queries(
    layout: TokenLayout, kinds: Kinds, device: torch.device, visible: Tensor | None = None
) -> ActiveQueries:
    """Find the queries of everything but ``kinds`` and padding, and what each may see.

    The mask is built from the query positions; no (T, T) mask exists on the way.

    Args:
        layout: the batch, on any device; on the CPU nothing waits for an accelerator.
        kinds: the kinds that issue no query.
        device: where the index tensors are wanted.
        visible: (B, T, K) bool, what each position may see, if that is not "all earlier real positions of the same
            document and itself": a step onto a filled cache.
    """
    batch, length = layout.kinds.shape
    bypassed = layout.is_kind(kinds)
    active = (layout.kinds != TokenKind.PAD) & ~bypassed
    rows = active.flatten().nonzero()[:, 0]
    width = max(1, int(active.sum(-1).max()))
    slots = rows // length * width + (active.cumsum(-1) - 1).flatten()[rows]
    column = torch.full((batch * width,), -1, device=rows.device).index_copy(0, slots, rows % length)
    column = column.view(batch, width, 1).to(device)
    layout = layout.to(device)
    if visible is None:
        mask = torch.arange(length, device=device) <= column
        mask = mask & (layout.kinds != TokenKind.PAD)[:, None, :]
        if (documents := layout.document_ids) is not None:
            mask &= documents.gather(1, column.clamp_min(0)[..., 0])[:, :, None] == documents[:, None, :]
    else:
        mask = visible.gather(1, column.clamp_min(0).expand(-1, -1, visible.shape[-1]))
    mask = (mask | (column < 0))[:, None]
    return ActiveQueries(rows.to(device), slots.to(device), bypassed.flatten().nonzero()[:, 0].to(device), mask)


def rotary_function(attention: Any) -> Any:
    """The ``apply_rotary_pos_emb`` that the attention module's own code uses, or None where there is none."""
    for cls in type(attention).__mro__:
        function = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None


def attend(
    attention: Any,
    normed: Tensor,
    queries: ActiveQueries,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any | None,
) -> Tensor:
    """Attention output of the active queries; keys and values come from (and are cached for) every position.

    Args:
        attention: the layer's ``self_attn`` with ``q_proj, k_proj, v_proj, o_proj`` and, if it has them, per-head
            ``q_norm`` and ``k_norm``.
        normed: (B, T, C), the normed layer input.
        queries: who asks, and what they see.
        position_embeddings: cos and sin, (B or 1, T, D) each.
        past_key_values: the cache, or None.

    Returns:
        (N, C), in the order of ``queries.rows``.
    """
    batch, length, _ = normed.shape
    heads = (batch, length, -1, attention.head_dim)
    key, value = attention.k_proj(normed).view(heads), attention.v_proj(normed).view(heads).transpose(1, 2)
    query = attention.q_proj(normed.flatten(0, 1).index_select(0, queries.rows)).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = _rotate(attention, query, key.transpose(1, 2), queries.rows, position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)

    width = queries.mask.shape[-2]
    grid = query.new_zeros(batch * width, *query.shape[1:]).index_copy(0, queries.slots, query)
    grid = grid.unflatten(0, (batch, width)).transpose(1, 2)
    # With a mask, enable_gqa would send CUDA to the unfused kernel; repeated keys keep the memory-efficient one.
    groups = grid.shape[1] // key.shape[1]
    attended = F.scaled_dot_product_attention(
        grid,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=queries.mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    attended = attended.transpose(1, 2).flatten(0, 1).flatten(1)
    return attention.o_proj(attended.index_select(0, queries.slots))


def _rotate(
    attention: Any, query: Tensor, key: Tensor, rows: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotate query (N, H, D) by the cos and sin of its positions and key (B, H, T, D) by those of all positions."""
    rotate = rotary_function(attention)
    cos, sin = (part.expand(key.shape[0], -1, -1) for part in position_embeddings)
    flat_cos, flat_sin = (part.flatten(0, 1).index_select(0, rows) for part in (cos, sin))
    # The function rotates a query and a key of the same length; the partner of each is a tensor without heads.
    query, _ = rotate(query, query[:, :0], flat_cos, flat_sin)
    _, key = rotate(key[:, :0], key, cos, sin)
    return query, key


def add_rows(hidden: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """``hidden`` (B, T, C) with ``update`` (N, C) added at the flat positions ``rows`` (N,); differentiable."""
    flat = hidden.flatten(0, 1)
    changed = (flat.index_select(0, rows) + update).to(flat.dtype)
    return flat.index_copy(0, rows, changed).view_as(hidden)


def backend_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """``visible`` (B, T, K) bool as the 4D mask that a transformers attention backend understands.

    Raises:
        PlanError: a backend that takes no such mask (flash attention).
    """
    visible = visible[:, None]
    if implementation == "sdpa":
        return visible
    if implementation == "eager":  # adds its mask to the scores: True would count as +1
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
    raise PlanError(
        f"attention implementation {implementation!r} takes no mask of its own, which packed documents and an evicted "
        "KV cache need; load the language model with attn_implementation='sdpa' or 'eager'"
    )
