"""Attention backends: what computes softmax attention in layers where some tokens ask and others do not.

``sdpa`` is the reference. ``varlen`` and ``flash_attention_2`` take runs of queries instead of a mask and compute
nothing that a mask would throw away; ``runs`` does so with a call of torch's attention for every run; ``flex`` compiles
a kernel that skips masked blocks; ``eager`` is the textbook. Layers that a plan leaves alone run the model's own
attention, except where runs of queries save it a mask over packed documents.

Shapes as in ``attention.py``, and: N keys of all runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision_train.errors import PlanError
from skipvision_train.plans.attention import Kernel, packed_rows, query_grid, sdpa
from skipvision_train.plans.stages import Queries
from skipvision_train.plans.visibility import Form, Segments

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "eager", "varlen", "flash_attention_2", "runs", "flex")

PACKED_DEVICES = ("cuda",)
PACKED_DTYPES = (torch.float16, torch.bfloat16)
PACKED_CAPABILITY = (8, 0)
PACKED_HEAD_DIM = 256
"""Where flash attention runs: on the devices and in the types named, from Ampere on, with heads of at most this width,
a multiple of 8."""

PackedCall = Callable[[Tensor, Tensor, Tensor, Segments, float, float], Tensor]
"""``(query (M, H, D), key (N, G, D), value (N, G, D), segments, scale, dropout) -> (M, H, D)``."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: one of ``BACKENDS`` but ``auto``.
        form: in which form it wants to know what queries may see.
        kernel: what computes.
    """

    name: str
    form: Form
    kernel: Kernel


SDPA = Backend("sdpa", "mask", sdpa)


def check_backend(name: str) -> None:
    """Refuse a backend that this installation does not have.

    Raises:
        PlanError: an unknown name, or a package that cannot be imported.
    """
    if name not in BACKENDS:
        raise PlanError(f"attention backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if name != "auto":
        _load(name)


@torch.compiler.disable  # it looks up and logs: nothing to compile
def backend_for(name: str, decoder: Any, inputs: Tensor, has_documents: bool) -> Backend:
    """The backend of a forward: where its inputs are, and in the type in which its attention will compute.

    Args:
        name: one of ``BACKENDS``.
        decoder: the decoder.
        inputs: (B, T) ids or (B, T, C) embeddings.
        has_documents: whether rows hold several documents.

    Raises:
        PlanError: the backend asked for cannot run there.
    """
    kind = inputs.device.type
    dtype = inputs.dtype if inputs.is_floating_point() else decoder.embed_tokens.weight.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    attention = decoder.layers[0].self_attn
    return select_backend(name, inputs.device, dtype, attention.head_dim, attention.attention_dropout, has_documents)


@cache
def select_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, has_documents: bool = False
) -> Backend:
    """The backend called ``name``, ``auto`` resolved, for a device, a type, a head width and an attention dropout.

    ``auto`` takes ``varlen``, or ``flash_attention_2`` if that is what is installed, where flash attention runs; on the
    CPU ``runs`` for packed documents; and ``sdpa`` everywhere else. A model with attention dropout does not get
    ``varlen``, which has none.

    Raises:
        PlanError: the backend asked for cannot run there.
    """
    unfit = _why_not_packed(device, dtype, head_dim)
    if name in ("varlen", "flash_attention_2") and unfit is not None:
        raise PlanError(f"attention backend {name!r}: {unfit}; use 'auto' or 'sdpa'")
    backend = _load(name) if name != "auto" else SDPA
    if name == "auto" and has_documents and device.type == "cpu":
        backend = _load("runs")
    elif name == "auto" and unfit is None:
        backend = _installed("varlen", "flash_attention_2") if not dropout else _installed("flash_attention_2")
    logger.info("Attention of layers under a plan: %s (asked for: %s; %s, %s)", backend.name, name, device, dtype)
    return backend


def _installed(*names: str) -> Backend:
    """The first backend that can be imported, or ``sdpa``."""
    for name in names:
        try:
            return _load(name)
        except PlanError as error:
            logger.info("%s", error)
    return SDPA


def _why_not_packed(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash attention does not run somewhere, or None."""
    if device.type not in PACKED_DEVICES:
        return f"runs on {' or '.join(PACKED_DEVICES)}, the inputs are on {device.type}"
    if dtype not in PACKED_DTYPES:
        allowed = " or ".join(str(kind).removeprefix("torch.") for kind in PACKED_DTYPES)
        return f"computes in {allowed}, this model in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > PACKED_HEAD_DIM:
        return f"takes heads of a width up to {PACKED_HEAD_DIM} that 8 divides, this model's have {head_dim}"
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < PACKED_CAPABILITY:
        return f"needs a GPU of compute capability {PACKED_CAPABILITY}, this one has {found}"
    return None


def _load(name: str) -> Backend:
    """Import what a backend needs; nothing else imports it.

    Raises:
        PlanError: it cannot be imported.
    """
    try:
        if name == "varlen":
            return Backend(name, "segments", _packed_kernel(name, _varlen_call(), has_dropout=False))
        if name == "flash_attention_2":
            return Backend(name, "segments", _packed_kernel(name, _flash_call(), has_dropout=True))
        if name == "runs":
            return Backend(name, "segments", _packed_kernel(name, _each_run, has_dropout=True))
        if name == "flex":
            return Backend(name, "blocks", _flex_kernel())
    except ImportError as error:
        package = "flash-attn (skipvision-train[flash-attn])" if name == "flash_attention_2" else "a newer torch"
        raise PlanError(f"attention backend {name!r}: {error}; install {package}, or use 'auto' or 'sdpa'") from error
    return SDPA if name == "sdpa" else Backend(name, "mask", eager)


def _refuse_dropout(name: str, attention: Any) -> None:
    if attention.training and attention.attention_dropout > 0:
        raise PlanError(
            f"attention backend {name!r} has no dropout, this model trains with attention_dropout="
            f"{attention.attention_dropout}; set it to 0, or use 'sdpa' or 'flash_attention_2'"
        )


def eager(attention: Any, query: Tensor, key: Tensor, value: Tensor, queries: Queries) -> Tensor:
    """Products, a softmax in fp32, products. Each key head serves a group of consecutive query heads."""
    grid = query_grid(query, queries, len(key)).unflatten(1, (key.shape[2], -1))  # (B, G, H / G, Q, D)
    key, value = key.transpose(1, 2)[:, :, None], value.transpose(1, 2)[:, :, None]
    logits = grid @ key.transpose(-1, -2) * attention.scaling
    if queries.mask is not None:
        logits = logits.masked_fill(~queries.mask[:, :, None], -torch.inf)
    elif queries.causal:
        slot = torch.arange(key.shape[-2], device=key.device)
        logits = logits.masked_fill(slot > slot[:, None], -torch.inf)
    share = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
    share = F.dropout(share, attention.attention_dropout, attention.training)
    return packed_rows((share @ value).flatten(1, 2), queries)


def _packed_kernel(name: str, call: PackedCall, has_dropout: bool) -> Kernel:
    """A kernel that hands runs of queries to ``call``, and queries that come in no runs to :func:`sdpa`."""

    def kernel(attention: Any, query: Tensor, key: Tensor, value: Tensor, queries: Queries) -> Tensor:
        if not has_dropout:
            _refuse_dropout(name, attention)
        segments = queries.segments
        if segments is None:
            return sdpa(attention, query, key, value, queries)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        if segments.key_index is not None:
            key, value = key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)
        dropout = attention.attention_dropout if attention.training else 0.0
        return call(query.to(value.dtype), key.to(value.dtype), value, segments, attention.scaling, dropout)

    return kernel


def _each_run(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, dropout: float) -> Tensor:
    """torch's attention, run after run. Asks the device how long they are: for the CPU, where that costs nothing."""
    asked, seen = segments.cu_seqlens_q.diff().tolist(), segments.cu_seqlens_k.diff().tolist()
    attended = []
    for run in zip(query.split(asked), key.split(seen), value.split(seen), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in run)
        length, keys = q.shape[2], k.shape[2]
        whole, grouped = length == keys, q.shape[1] != k.shape[1]
        mask = None if whole else torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        attended.append(
            F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=whole, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def _varlen_call() -> PackedCall:
    """torch's own. Its signature grew: first ``is_causal``, no scale and no word on grouped heads; later a window."""
    from torch.nn.attention.varlen import varlen_attn

    run: Any = varlen_attn
    takes = inspect.signature(run).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    takes_scale, takes_groups = "scale" in takes, "enable_gqa" in takes

    def call(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, dropout: float) -> Tensor:
        more, groups = dict(causal), query.shape[1] // key.shape[1]
        if takes_scale:
            more["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        if takes_groups:
            more["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        bounds = segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_q, segments.max_k
        return run(query, key, value, *bounds, **more)

    return call


def _flash_call() -> PackedCall:
    """The flash-attn package, version 2.1 or later: causal there is aligned at the bottom right."""
    from flash_attn import flash_attn_varlen_func

    def call(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, dropout: float) -> Tensor:
        bounds = segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_q, segments.max_k
        return flash_attn_varlen_func(query, key, value, *bounds, dropout_p=dropout, softmax_scale=scale, causal=True)

    return call


def _flex_kernel() -> Kernel:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)  # compiles when it is first called

    def kernel(attention: Any, query: Tensor, key: Tensor, value: Tensor, queries: Queries) -> Tensor:
        _refuse_dropout("flex", attention)
        gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        if gradient and query.device.type == "cpu":
            raise PlanError(
                "attention backend 'flex': torch has no backward of it on the CPU; use 'sdpa' or 'eager', or run under "
                "torch.no_grad()"
            )
        run = compiled if query.is_cuda else flex_attention
        attended = run(
            query_grid(query.to(value.dtype), queries, len(key)),
            key.to(value.dtype).transpose(1, 2),
            value.transpose(1, 2),
            block_mask=queries.blocks,
            scale=attention.scaling,
            enable_gqa=query.shape[1] != key.shape[2],
        )
        return packed_rows(attended, queries)

    return kernel
