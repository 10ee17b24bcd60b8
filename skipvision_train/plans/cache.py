"""KV caches that grow in place, and that hold less than the sequence: positions were evicted after prefill, or dropped
before a layer saw them.

Skip-Vision (Eq. 7). The public code of the method keeps everything and re-slices at every step; here the cache shrinks
once, and the memory is given back. A layer keeps reporting its *logical* length (prompt plus generated tokens), so
positions are not renumbered; what it holds, its *physical* length, is shorter. Rows that hold fewer positions than
others have unused slots among those of the prompt, which the mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from skipvision_train.errors import PlanError
from skipvision_train.plans.stages import pick, used_slots
from skipvision_train.plans.transfer import upload

GROWTH = 16
"""A cache layer that is full moves to memory for one part in so many more than it needs."""


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new positions behind the old ones: transformers' own copies itself at every step.

    Filled for the first time it takes as much memory as it needs, later some more. ``keys`` and ``values`` are views of
    that memory; a second layer made of the same views must not grow as well.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, G, T, D); returns all there are, (B, G, physical length, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = extended(self.keys, key_states), extended(self.values, value_states)
        return self.keys, self.values


def extended(held: Tensor, new: Tensor) -> Tensor:
    """``held`` (B, G, n, D), or empty, with ``new`` (B, G, T, D) behind it: in the memory of ``held`` if it has room.

    The memory is (B, room, G, D), so that a step of decoding reads one stretch of it per row. Where autograd looks on,
    which memory that changes would disturb, everything is copied.
    """
    if new.requires_grad or held.requires_grad or held.is_inference() != torch.is_inference_mode_enabled():
        return torch.cat([held, new], dim=-2)
    batch, heads, added, width = new.shape
    length = held.shape[-2] if held.numel() else 0
    position = heads * width
    room = held.untyped_storage().nbytes() // held.element_size() // (batch * position)
    strides = (room * position, width, position, 1)
    is_own = held.stride() == strides and held.storage_offset() == 0
    if not is_own or length + added > room:
        room = length + added + ((length + added) // GROWTH if length else 0)
        memory = new.new_empty(batch, room, heads, width).transpose(1, 2)
        if length:
            memory[:, :, :length] = held
        held = memory
    result = held.as_strided((batch, heads, length + added, width), held.stride(), 0)
    result[:, :, length:] = new
    return result


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of ``config``, as transformers' ``generate`` makes it but for its growth."""
    cache = DynamicCache(config=config)
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:  # not those with a sliding window
            layers[i] = GrowingLayer()
    return cache


class EvictedLayer(GrowingLayer):
    """A cache layer from which prompt positions were removed; it grows by the generated tokens.

    Attributes:
        keys, values: (batch, heads, kept + generated, width).
        columns: (batch, kept) int64, the prompt column of every kept slot; -1 in unused slots.
        prompt_length: how many columns the prompt had.
        padded: whether there are unused slots.
        shift: (batch,) int64, by how much rotary positions fall behind the columns where a drop renumbers; or None.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        columns: Tensor,
        prompt_length: int,
        padded: bool = True,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.columns = columns
        self.prompt_length = prompt_length
        self.padded = padded
        self.shift = shift

    @property
    def physical_length(self) -> int:
        """How many slots the layer holds, the padding at the left included."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def generated(self) -> int:
        """How many tokens were added after the eviction."""
        return self.physical_length - self.columns.shape[-1]

    def get_seq_length(self) -> int:
        """The logical length: prompt and generated tokens, evicted ones counted."""
        return self.prompt_length + self.generated

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length with the new tokens, and the offset that puts the new tokens at their logical position."""
        return self.physical_length + query_length, self.prompt_length - self.columns.shape[-1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -n removes n, a positive number is the logical length to keep.

        Raises:
            PlanError: the prompt would be cut; what was evicted cannot come back.
        """
        surplus = self.get_seq_length() - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if surplus > self.generated:
            raise PlanError(
                f"KV cache: cannot remove {surplus} tokens, only the {self.generated} generated after eviction"
            )
        if self.keys is not None and self.values is not None:
            kept = self.physical_length - max(surplus, 0)
            self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]

    def reset(self) -> None:
        """Empty the layer; the next prompt fills it like a fresh one."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = self.columns[:, :0]
        self.prompt_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows ``beam_idx`` (beam search)."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx.to(self.columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._rows(torch.arange(len(self.columns), device=self.columns.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64 or bool)."""
        super().batch_select_indices(indices)
        self._rows(indices.to(self.columns.device))

    def _rows(self, rows: Tensor) -> None:
        self.columns = self.columns[rows]
        self.shift = None if self.shift is None else self.shift[rows]


def check_evictable(cache: Any) -> None:
    """Refuse a cache whose layers are not plain growing ones.

    Raises:
        PlanError: with the class that was found.
    """
    way_out = "pass past_key_values=DynamicCache(), or leave cache_implementation out"
    if not isinstance(cache, DynamicCache):
        raise PlanError(
            f"KV cache: a {type(cache).__name__} cannot give up single tokens, as this plan's evictions or drops do; "
            f"{way_out}"
        )
    for i, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, GrowingLayer, EvictedLayer):
            raise PlanError(
                f"KV cache: layer {i} is a {type(layer).__name__}, which cannot give up single tokens; {way_out}"
            )


def thin(
    cache: DynamicCache, layers: Sequence[int], columns: Tensor, used: Tensor, prompt_length: int, shift: Tensor | None
) -> None:
    """Tell ``layers`` of a cache which columns their slots hold: they were filled after a drop.

    Args:
        cache: filled by a prefill; these layers hold (batch, slots) positions.
        layers: their numbers.
        columns: (batch, slots) int64 on the cache's device.
        used: (batch, slots) bool on the CPU, False in unused slots.
        prompt_length: T.
        shift: (batch,) int64, as in :class:`EvictedLayer`.
    """
    padded = not bool(used.all())
    columns = columns.masked_fill(~upload(used, columns.device), -1)
    held: list[Any] = cache.layers
    for i in layers:
        held[i] = EvictedLayer(held[i].keys, held[i].values, columns, prompt_length, padded, shift)


def evict(cache: DynamicCache, keep: Tensor) -> None:
    """Remove positions from every layer of a filled cache, in place.

    Args:
        cache: holds (batch, length) positions in each layer, or what drops left of them.
        keep: (batch, length) bool, True where the position stays. Padding should not stay. On the CPU nobody waits for
            a device, unless drops depend on scores.

    Raises:
        PlanError: a cache of another class, or of another length than ``keep``.
    """
    check_evictable(cache)
    if cache.get_seq_length() != keep.shape[-1]:
        raise PlanError(f"KV cache: holds {cache.get_seq_length()} positions, the eviction is for {keep.shape[-1]}")
    whole = torch.arange(keep.shape[-1], device=keep.device).expand_as(keep)
    done: dict[tuple[int, torch.device], tuple[Tensor, Tensor, bool]] = {}
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        columns, shift = (layer.columns, layer.shift) if isinstance(layer, EvictedLayer) else (whole, None)
        made = id(columns), layer.keys.device
        if made not in done:  # layers that hold the same share their tensors, which steps of decoding tell them by
            slots, left, padded = _staying(columns, keep)
            done[made] = upload(slots, layer.keys.device), upload(left, layer.keys.device), padded
        slots, left, padded = done[made]
        index = slots[:, None, :, None].expand(-1, layer.keys.shape[1], -1, -1)
        keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
        values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[-1]))
        layers[i] = EvictedLayer(keys, values, left, keep.shape[-1], padded, shift)


def _staying(columns: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of the slots that hold ``columns``: which stay (B, K), what they hold (-1: unused), and whether any is unused."""
    stays = upload(keep, columns.device).gather(1, columns.clamp_min(0)) & (columns >= 0)
    counts = stays.sum(-1).tolist()
    slots = pick(stays, counts)
    used = upload(used_slots(counts), columns.device)
    return slots, columns.gather(1, slots).masked_fill(~used, -1), not bool(used_slots(counts).all())


def evicted_layers(cache: Any) -> dict[int, EvictedLayer]:
    """The layers of a cache that hold less than the sequence, by number; none for other caches and without a cache."""
    layers = getattr(cache, "layers", ())
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, EvictedLayer) and layer.prompt_length}


def check_step_mask(layer: EvictedLayer, attention_mask: Tensor | None, query_length: int) -> None:
    """Refuse an attention mask that is not (batch, logical length + query_length).

    Raises:
        PlanError: with both shapes.
    """
    expected = (layer.columns.shape[0], layer.get_seq_length() + query_length)
    if attention_mask is not None and tuple(attention_mask.shape) != expected:
        raise PlanError(
            f"attention_mask: has shape {tuple(attention_mask.shape)}; after eviction it still covers the full "
            f"length, {expected}"
        )


def visible_slots(layer: EvictedLayer, attention_mask: Tensor | None, query_length: int) -> Tensor:
    """What new tokens may see in an evicted cache.

    Args:
        layer: any layer of the cache, before the new tokens are added.
        attention_mask: (batch, logical length + query_length), 0 on padding, or None.
        query_length: how many new tokens there are.

    Returns:
        (batch, query_length, physical length + query_length) bool.

    """
    device = layer.columns.device
    logical, physical = layer.get_seq_length(), layer.physical_length
    newer = torch.arange(layer.prompt_length, logical + query_length, device=device)
    slots = torch.cat([layer.columns, newer.expand(layer.columns.shape[0], -1)], dim=-1)
    real = slots >= 0
    if attention_mask is not None:
        real = real & attention_mask.to(device).bool().gather(1, slots.clamp_min(0))
    index = torch.arange(slots.shape[-1], device=device)
    query = physical + torch.arange(query_length, device=device)[:, None]
    return ((index <= query) & real[:, None, :]) | (index == query)


def bytes_held(cache: Any) -> int:
    """Bytes of memory that the keys and values of a cache keep allocated.

    Storage counts, not shape: a cut-out view of a full cache would save nothing.
    """
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
