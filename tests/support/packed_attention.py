"""Slow stand-ins for packed attention kernels, with the signatures of the real functions, that run on the CPU."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import varlen

from skipvision_train.plans import attach, backends


def slow_runs(query, key, value, ends_q, ends_k, max_q, max_k, scale):
    """Run by run and query by query: the last query of a run sees all of its keys, the one before all but one, ..."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert (type(max_q), type(max_k)) == (int, int)
    assert query.dtype == key.dtype == value.dtype
    ends_q, ends_k = ends_q.tolist(), ends_k.tolist()
    assert (ends_q[0], ends_k[0], ends_q[-1], ends_k[-1]) == (0, 0, len(query), len(key))
    runs = list(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True))
    assert max_q == max(end - begin for begin, end, _, _ in runs)
    assert max_k == max(end - begin for _, _, begin, end in runs)
    groups, rows = query.shape[1] // key.shape[1], []
    for q_begin, q_end, k_begin, k_end in runs:
        for i in range(q_begin, q_end):
            seen = k_end - (q_end - 1 - i)
            assert seen > k_begin
            heads = []
            for head in range(query.shape[1]):
                keys, values = key[k_begin:seen, head // groups], value[k_begin:seen, head // groups]
                heads.append((keys @ query[i, head] * scale).softmax(-1) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


class Fakes:
    """Stand-ins, and the bounds that they were called with."""

    def __init__(self):
        self.calls = []

    def first_varlen(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
    ):  # torch 2.9 and 2.10
        assert is_causal
        return self._run(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), query.shape[-1] ** -0.5)

    def middle_varlen(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):  # without a word on grouped heads
        assert window_size == (-1, 0)
        return self._run(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), scale)

    def varlen(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # torch 2.15  # fmt: skip
        assert window_size == (-1, 0)
        return self._run(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), scale, enable_gqa)

    def flash(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # flash-attn 2  # fmt: skip
        assert causal
        self.dropout = dropout_p
        return self._run(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), softmax_scale, True)

    def _run(self, query, key, value, bounds, scale, groups=False):
        assert groups or query.shape[1] == key.shape[1]
        self.calls.append(bounds)
        return slow_runs(query, key, value, *bounds, scale)


FAKES = {
    "varlen of torch 2.10": ("varlen", "first_varlen"),
    "varlen without groups": ("varlen", "middle_varlen"),
    "varlen of torch 2.15": ("varlen", "varlen"),
    "flash-attn": ("flash_attention_2", "flash"),
}


@contextmanager
def standing_in(function, dtypes=(torch.float32,)):
    """Run the packed backends on the CPU, in ``dtypes``, with a slow ``function`` in the place of the real ones."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = function
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", function)
        patch.setitem(sys.modules, "flash_attn", module)
        patch.setattr(backends, "PACKED_DEVICES", ("cpu",))
        patch.setattr(backends, "PACKED_DTYPES", dtypes)
        backends.select_backend.cache_clear()
        yield
    backends.select_backend.cache_clear()


def logits_under(kit, model, layout, plan, backend):
    with attach(model, plan, backend) as attachment:
        if not attachment.active:
            return kit.logits_of(model, kit.ids_for(layout), layout, plan)
        return model(kit.ids_for(layout), token_layout=layout, use_cache=False).logits
