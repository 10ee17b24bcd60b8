"""Cross entropy of the LM head at supervised positions, without the table of all logits.

With a vocabulary of 128k a batch's logits are the largest tensor of a training step: 2,400 supervised positions are
1.2 GB in fp32, their gradient as much again. Here the head runs over slices of the vocabulary. The forward pass keeps
the log of the normaliser alone; the backward pass computes every slice's logits again, which gives that slice's rows of
the weight's gradient in one product: nothing is summed up in half precision.

N supervised positions, C width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.plans.layout import predicting
from skipvision_train.plans.transfer import upload

LOSSES = ("chunked", "plain", "liger")
"""``trainer.loss``."""

SLICE = 2**25
"""Logits that are held at a time: 128 MiB in fp32. A batch with fewer has them all at once, and computes none twice."""


def check_loss(kind: str) -> None:
    """Refuse what is not installed.

    Raises:
        ConfigError: ``liger`` without liger-kernel, or without a GPU.
    """
    if kind != "liger":
        return
    if find_spec("liger_kernel") is None:
        raise ConfigError("trainer.loss: liger needs liger-kernel (pip install 'skipvision-train[liger]'); use chunked")
    if not torch.cuda.is_available():
        raise ConfigError("trainer.loss: liger runs on a GPU only; use chunked")


def predicted_losses(
    head: nn.Module, hidden: Tensor, labels: Tensor, read: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """As :func:`head_losses`, of what positions predict; the head sees no other position.

    Args:
        head: the LM head.
        hidden: (B, T, C).
        labels: (B, T) int64, -100 where nothing is supervised; label t is predicted at t - 1.
        read: (B, T) bool, which positions predict a supervised token; None: as the labels say. On the CPU nothing waits
            for a GPU.
        kind: of :data:`LOSSES`.
    """
    read = predicting(labels) if read is None else read
    index = upload(read.flatten().nonzero()[:, 0], hidden.device)
    targets = labels.flatten().index_select(0, index + 1)
    return head_losses(head, hidden.flatten(0, 1).index_select(0, index), targets, kind)


def head_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, kind: str, held: int | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropies, and (N,) float32 without a graph, that of every position.

    The head is called as a module, once: ZeRO-3 fetches weights where modules run, and all processes must agree on how
    often, however many positions each has.

    Args:
        head: the LM head. One that is no plain linear map with a weight alone is computed as ``plain``.
        hidden: (N, C).
        targets: (N,) int64.
        kind: of :data:`LOSSES`. ``liger`` has no losses of single positions to give: they take a forward pass of the
            head of their own.
        held: logits that may be held at a time; None is :data:`SLICE`.
    """
    held = SLICE if held is None else held
    plain = kind == "plain" or type(head) is not nn.Linear or head.bias is not None or not len(hidden)
    if not plain and kind == "chunked":
        # Not by the weight's shape: under ZeRO-3 a look at it from here has it gathered for the whole model's forward.
        plain = len(hidden) * cast(nn.Linear, head).out_features <= held
    if plain:
        losses = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    elif kind == "chunked":
        with _runs(head, partial(chunked_losses, targets=targets, held=held)):
            losses = head(hidden)
    else:
        with _runs(head, partial(_liger, targets=targets, held=held)):
            return head(hidden)
    return losses.sum(), losses.detach()


@contextmanager
def _runs(head: nn.Module, compute: Callable[[Tensor, Tensor], Any]) -> Iterator[None]:
    """Have ``head(hidden)`` give ``compute(hidden, weight)``; its hooks run as ever."""

    def forward(module: Any, hidden: Tensor) -> Any:
        return compute(hidden, module.weight)

    before = head.__dict__.get("forward")
    head.__dict__["forward"] = MethodType(forward, head)
    try:
        yield
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def chunked_losses(hidden: Tensor, weight: Tensor, targets: Tensor, held: int = SLICE) -> Tensor:
    """(N,) float32 cross entropies of ``hidden @ weight.T``, differentiable in both.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,) int64 in [0, V).
        held: logits at a time; at least one column of them is.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    losses: Tensor = _Chunked.apply(hidden, weight, targets, held, dtype)
    return losses


def _slices(positions: int, vocabulary: int, held: int) -> Iterator[slice]:
    width = max(1, min(vocabulary, held // max(1, positions)))
    for start in range(0, vocabulary, width):
        yield slice(start, min(vocabulary, start + width))


class _Chunked(torch.autograd.Function):
    """Products in ``dtype``, softmax and sums in fp32, as with a head under autocast followed by ``.float()``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, held: int, dtype: torch.dtype) -> Tensor:
        device = hidden.device.type
        states = hidden.to(dtype)
        # In fp64, so that the number of slices leaves no trace.
        normaliser = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
        chosen = hidden.new_zeros(len(hidden), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for part in _slices(len(hidden), len(weight), held):
                logits = (states @ weight[part].to(dtype).T).float()
                inside = (targets >= part.start) & (targets < part.stop)
                column = (targets - part.start).clamp(0, part.stop - part.start - 1)
                chosen += torch.where(inside, logits.gather(1, column[:, None])[:, 0], 0.0)
                normaliser = torch.logaddexp(normaliser, logits.logsumexp(1).double())
        losses = (normaliser - chosen).float()
        ctx.save_for_backward(hidden, weight, targets, normaliser.float())
        ctx.held, ctx.dtype = held, dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        (gradient,) = gradients
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        states, dtype = hidden.to(ctx.dtype), ctx.dtype
        to_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_hidden else None
        to_weight = torch.empty_like(weight) if wants_weight else None
        rows = torch.arange(len(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), len(weight), ctx.held):
                own = weight[part].to(dtype)
                change = (states @ own.T).float().sub_(normaliser[:, None]).exp_()
                inside = (targets >= part.start) & (targets < part.stop)
                column = (targets - part.start).clamp(0, part.stop - part.start - 1)
                change[rows, column] -= inside.float()
                change = change.mul_(gradient[:, None]).to(dtype)
                if to_weight is not None:
                    to_weight[part] = change.T @ states
                if to_hidden is not None:
                    to_hidden += change @ own
        return (None if to_hidden is None else to_hidden.to(hidden.dtype)), to_weight, None, None, None


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """liger-kernel's fused head and loss, which computes its gradients in the forward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    total: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
        weight, hidden, targets
    )
    with torch.no_grad():
        return total, chunked_losses(hidden, weight, targets, held)
