"""The skip KV-cache: after prefill, chosen positions leave the cache, and the memory they held is given back.

Skip-Vision (Eq. 7). The public code of the method keeps everything and re-slices at every step; here the cache shrinks
once. A layer keeps reporting its *logical* length (prompt plus generated tokens), so positions are not renumbered; what
it holds, its *physical* length, is shorter. Rows that keep different numbers of positions are padded on the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from skipvision_train.errors import PlanError


class EvictedLayer(DynamicLayer):
    """A cache layer from which prompt positions were removed; it grows by the generated tokens.

    Attributes:
        keys, values: (batch, heads, kept + generated, width).
        columns: (batch, kept) int64, the prompt column of every kept slot, ascending; -1 on the padding at the left.
        prompt_length: how many positions the prompt had before eviction.
    """

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor, prompt_length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.columns = columns
        self.prompt_length = prompt_length

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
        self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64 or bool)."""
        super().batch_select_indices(indices)
        self.columns = self.columns[indices.to(self.columns.device)]


def check_evictable(cache: Any) -> None:
    """Refuse a cache whose layers are not plain growing ones.

    Raises:
        PlanError: with the class that was found.
    """
    if not isinstance(cache, DynamicCache):
        raise PlanError(f"KV cache: a skip plan needs a transformers DynamicCache, found {type(cache).__name__}")
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise PlanError(f"KV cache: layer {i} is a {type(layer).__name__}; a skip plan needs plain DynamicLayer")


def evict(cache: DynamicCache, keep: Tensor) -> None:
    """Remove positions from every layer of a filled cache, in place.

    Args:
        cache: holds (batch, length) positions in each layer.
        keep: (batch, length) bool, True where the position stays. Padding should not stay.

    Raises:
        PlanError: a cache of another class, or of another length than ``keep``.
    """
    check_evictable(cache)
    if cache.get_seq_length() != keep.shape[-1]:
        raise PlanError(f"KV cache: holds {cache.get_seq_length()} positions, the eviction is for {keep.shape[-1]}")
    counts = keep.sum(-1, keepdim=True)
    kept = int(counts.max())
    # A stable sort of False < True puts the kept columns last and leaves them in order: padding ends up on the left.
    columns = keep.int().argsort(dim=-1, stable=True)[:, keep.shape[-1] - kept :]
    padding = torch.arange(kept, device=keep.device) < kept - counts
    marked = columns.masked_fill(padding, -1)
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        index = columns.to(layer.keys.device)[:, None, :, None].expand(-1, layer.keys.shape[1], -1, -1)
        keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
        values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[-1]))
        layers[i] = EvictedLayer(keys, values, marked.to(keys.device), keep.shape[-1])


def evicted_layer(cache: Any) -> EvictedLayer | None:
    """The first layer of a cache from which something was evicted, or None: nothing was, or there is no cache."""
    layers = getattr(cache, "layers", ())
    if layers and isinstance(layers[0], EvictedLayer) and layers[0].prompt_length:
        return layers[0]
    return None


def visible_slots(layer: EvictedLayer, attention_mask: Tensor | None, query_length: int) -> Tensor:
    """What new tokens may see in an evicted cache.

    Args:
        layer: any layer of the cache, before the new tokens are added.
        attention_mask: (batch, logical length + query_length), 0 on padding, or None.
        query_length: how many new tokens there are.

    Returns:
        (batch, query_length, physical length + query_length) bool.

    Raises:
        PlanError: an attention mask of another shape.
    """
    device = layer.columns.device
    logical, physical = layer.get_seq_length(), layer.physical_length
    newer = torch.arange(layer.prompt_length, logical + query_length, device=device)
    slots = torch.cat([layer.columns, newer.expand(layer.columns.shape[0], -1)], dim=-1)
    real = slots >= 0
    if attention_mask is not None:
        expected = (slots.shape[0], logical + query_length)
        if tuple(attention_mask.shape) != expected:
            raise PlanError(
                f"attention_mask: has shape {tuple(attention_mask.shape)}; after eviction it still covers the full "
                f"length, {expected}"
            )
        real = real & attention_mask.to(device).bool().gather(1, slots.clamp_min(0))
    index = torch.arange(slots.shape[-1], device=device)
    query = physical + torch.arange(query_length, device=device)[:, None]
    return ((index <= query) & real[:, None, :]) | (index == query)


def bytes_held(cache: Any) -> int:
    """Bytes of memory that the keys and values of a cache keep allocated; a view counts with all it is a view of."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
