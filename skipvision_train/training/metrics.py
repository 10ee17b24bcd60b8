"""The numbers of a line of ``metrics.jsonl``: what the steps since the last line held, cost and took."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind
from skipvision_train.plans.transfer import upload
from skipvision_train.training.facts import BatchFacts
from skipvision_train.training.work import Work, WorkCounter

KINDS = len(TokenKind)
VISUAL_KINDS = [TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED, TokenKind.SUMMARY]

Gather = Callable[[Tensor], Tensor]
"""(K,) float64 of this process -> (processes, K) of all."""


class PartNorms:
    """Gradient norm of every part, read off the optimizer's own groups right before its step.

    Works the same under ZeRO, where each process holds a share of every group's gradient at that moment and no whole
    gradient exists: squares are summed over the processes. What the optimizer sees is clipped, and under plain data
    parallelism every process sees all of it; both are one factor for all parts, which the whole norm settles.
    """

    def __init__(self) -> None:
        self.due = False
        self._squares: dict[str, Tensor] = {}

    def hook(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """To be registered with ``register_step_pre_hook``; costs nothing in steps that are not :attr:`due`."""
        if not self.due:
            return
        for group in optimizer.param_groups:
            gradients = [p.grad.float() for p in group["params"] if p.grad is not None]
            if gradients:
                square = torch.stack(torch._foreach_norm(gradients)).square().sum()
                known = self._squares.get(group["name"])
                self._squares[group["name"]] = square if known is None else known + square

    def take(self, parts: Sequence[str], device: torch.device) -> Tensor:
        """(parts,) float64: squares of this process since the last call; 0 where there were none."""
        squares, self._squares = self._squares, {}
        zero = torch.zeros((), device=device)
        return torch.stack([squares.get(part, zero).to(device) for part in parts]).double()


def share_norm(squares: Sequence[float], norm: float) -> list[float]:
    """Norms whose squares add up to that of ``norm`` and are to each other as ``squares``; empty without any."""
    total = sum(squares)
    if not (total > 0 and np.isfinite(total) and np.isfinite(norm)):
        return []
    return [norm * float(np.sqrt(square / total)) for square in squares]


class Meter:
    """Adds up what this process's steps hold; :meth:`read` joins the processes.

    Args:
        counter: of work.
        sources: names of the recipe's sources.
        parts: that train.
        device: where losses are.
    """

    def __init__(
        self, counter: WorkCounter, sources: Sequence[str], parts: Sequence[str], device: torch.device
    ) -> None:
        self.counter, self.sources, self.parts, self.device = counter, tuple(sources), tuple(parts), device
        self.norms = PartNorms()
        self._clear()
        self._pending_losses = torch.zeros_like(self._losses)
        self._pending_tokens = np.zeros(len(self.sources))

    def _clear(self) -> None:
        self._kinds: NDArray[np.int64] = np.zeros(KINDS, np.int64)
        self._places = 0
        self._supervised = 0
        self._work, self._around = Work(), 0.0
        self._losses = torch.zeros(len(self.sources), dtype=torch.float64, device=self.device)
        self._tokens = np.zeros(len(self.sources))

    def count(self, batches: Sequence[BatchFacts], plan: SkipPlan) -> None:
        """The micro batches of a step to come."""
        for facts in batches:
            self._kinds += facts.kinds.sum(0)
            self._places += facts.places
            self._supervised += facts.supervised
            self._around += self.counter.around(facts.tiles, facts.supervised)
            for kinds in facts.kinds.tolist():
                self._work += self.counter.sample(tuple(kinds), plan)

    def add_losses(self, losses: Tensor, facts: BatchFacts) -> None:
        """The (N,) losses of a micro batch's supervised tokens; nothing waits for them."""
        places = upload(torch.from_numpy(facts.sources), losses.device)
        self._pending_losses.index_add_(0, places, losses.double())
        self._pending_tokens += np.bincount(facts.sources, minlength=len(self.sources))

    def end_step(self, skipped: bool) -> None:
        """The step is done; the losses of a skipped one do not count."""
        if not skipped:
            self._losses += self._pending_losses
            self._tokens += self._pending_tokens
        self._pending_losses = torch.zeros_like(self._losses)
        self._pending_tokens = np.zeros(len(self.sources))

    def read(self, gather: Gather) -> Totals:
        """All processes' numbers since the last reading."""
        numbers = [self._places, self._supervised, *self._work.as_list(), self._around, *self._tokens.tolist()]
        mine = torch.tensor([*self._kinds.tolist(), *numbers], dtype=torch.float64)
        memory = torch.tensor(memory_gb(self.device), dtype=torch.float64)
        squares = self.norms.take(self.parts, self.device)
        rows = gather(torch.cat([mine.to(self.device), self._losses, squares, memory.to(self.device)])).cpu().numpy()
        self._clear()
        return Totals(self.sources, self.parts, rows[:, :-2].sum(0), rows[:, -2:].max(0))


class Totals:
    """Sums over all processes.

    Args:
        sources: names.
        parts: names.
        sums: the vector of :meth:`Meter.read`, without memory.
        memory: (2,) GB of the process that has most: resident, device.
    """

    def __init__(
        self, sources: Sequence[str], parts: Sequence[str], sums: NDArray[np.float64], memory: NDArray[np.float64]
    ) -> None:
        rest = iter(np.split(sums, np.cumsum([KINDS, 2, 5, 1, len(sources), len(sources)])))
        self.sources, self.parts, self.memory = sources, parts, memory
        self.kinds, (self.places, self.supervised) = next(rest), next(rest)
        self.work, self.around = Work(*next(rest).tolist()), float(next(rest)[0])
        self.source_tokens, self.source_losses, self.squares = rest

    def logs(self, depth: int) -> dict[str, float]:
        """Everything that needs no time: losses per source, tokens, shares that skip, memory.

        Args:
            depth: decoder layers.
        """
        visual, work = float(self.kinds[VISUAL_KINDS].sum()), self.work
        real = visual + float(self.kinds[TokenKind.TEXT])
        logs = {
            f"loss/{name}": float(loss / tokens)
            for name, loss, tokens in zip(self.sources, self.source_losses, self.source_tokens, strict=True)
            if tokens
        }
        logs |= {
            "supervised_tokens": int(self.supervised),
            "padding": round(1 - real / max(1.0, self.places), 4),
            "tokens/text": real - visual,
            "tokens/visual": visual,
            "tokens/supervised": float(self.supervised),
            "tokens/padding": float(self.places) - real,
            "tokens/ffn_skipped": work.ffn_skipped / depth,
            "memory/peak_rss_gb": round(float(self.memory[0]), 3),
        }
        if work.token_layers:
            logs["skip/ffn"] = work.ffn_skipped / work.token_layers
            logs["skip/attention"] = work.attention_skipped / work.token_layers
            logs["skip/flops"] = 1 - work.flops / work.dense_flops
        if self.memory[1]:
            logs["memory/peak_device_gb"] = round(float(self.memory[1]), 3)
        return logs

    def norms(self, norm: float | None) -> dict[str, float]:
        """The gradient's norm ``norm`` part by part."""
        shares = share_norm(self.squares.tolist(), norm) if norm is not None else []
        return {f"grad_norm/{part}": share for part, share in zip(self.parts, shares, strict=False)}

    def speed(self, seconds: float, peak_flops: float | None) -> dict[str, float]:
        """Tokens per second, and the share of the peak that was used.

        Args:
            seconds: that the steps took.
            peak_flops: of all devices together, per second; None leaves the utilisation out.
        """
        real = float(self.kinds.sum())
        logs = {"tokens_per_second": round(real / seconds, 2)}
        if peak_flops is not None:
            logs["mfu"] = (self.work.flops + self.around) / seconds / peak_flops
            logs["mfu_dense"] = (self.work.dense_flops + self.around) / seconds / peak_flops
        return logs


def time_logs(spent: Mapping[str, float], steps: int) -> dict[str, float]:
    """Seconds per step, saving and sampling left out, and the shares of its phases."""
    step = sum(seconds for phase, seconds in spent.items() if phase not in ("save", "samples"))
    if step <= 0 or steps <= 0:
        return {}
    shares = {phase: spent[phase] / step for phase in ("data", "forward", "backward", "optimizer", "other")}
    return {"time/step": step / steps, **{f"time/{phase}": round(share, 4) for phase, share in shares.items()}}


def memory_gb(device: torch.device) -> list[float]:
    """The most that this process was resident with, and had allocated on its GPU (0 without one); 10^9 bytes."""
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return [resident / 1e9, held / 1e9]
