"""The LM head's cross entropy in slices of the vocabulary, and a last layer that runs only where it is read."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.models import loss as loss_module
from skipvision_train.models.loss import LOSSES, check_loss, chunked_losses, head_losses
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import dense, fastv, skip_ffn, vskip
from skipvision_train.plans.rules import TokenKind

N, C, V = 13, 8, 101


def problem(dtype=torch.float64, positions=N):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (3 * torch.randn(V, C, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    targets = torch.randint(V, (positions,), generator=generator)
    targets[:2] = torch.tensor([0, V - 1])  # the first and the last column
    return hidden, weight, targets


def by_hand(hidden, weight, targets, upstream):
    """Losses and gradients from the definition, in float64: softmax minus one at the target."""
    h, w = hidden.detach().double(), weight.detach().double()
    logits = h @ w.T
    p = (logits - logits.max(1, keepdim=True).values).exp()
    p = p / p.sum(1, keepdim=True)
    losses = -p[range(len(h)), targets].log()
    p[range(len(h)), targets] -= 1
    p = p * upstream.double()[:, None]
    return losses, p @ w, p.T @ h


@pytest.mark.parametrize("held", [1, N, 7 * N + 3, N * V - 1, 10 * N * V])
def test_losses_and_gradients_by_hand(held):
    hidden, weight, targets = problem(torch.float32)
    upstream = torch.linspace(-1, 2, N)
    losses = chunked_losses(hidden, weight, targets, held)
    (losses * upstream).sum().backward()
    expected = by_hand(hidden, weight, targets, upstream)
    # fp32 against fp64, with logits up to 30: measured at most 5e-7 relative to the largest value of each.
    for found, value in zip((losses.detach(), hidden.grad, weight.grad), expected, strict=True):
        assert (found.double() - value).abs().max() < 2e-6 * value.abs().max()


def test_a_very_certain_head_does_not_overflow():
    hidden, weight, targets = problem(torch.float32)
    losses = chunked_losses(hidden * 1000, weight, targets, 3 * N)
    torch.testing.assert_close(losses, F.cross_entropy(1000 * hidden @ weight.T, targets, reduction="none"))
    losses.sum().backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets = problem()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    chunked_losses(hidden, weight, targets, 5 * N).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_half_precision_is_as_far_from_the_truth_as_the_plain_form(mode):
    """Weights' gradients are no sums of half-precision pieces."""
    errors = {}
    for kind in ("plain", "chunked"):
        hidden, weight, targets = problem(torch.bfloat16 if mode == "bf16" else torch.float32, positions=64)
        upstream = torch.ones(64)
        head = nn.Linear(C, V, bias=False)
        head.weight = nn.Parameter(weight.detach().clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            total, losses = head_losses(head, hidden, targets, kind, held=9 * 64)
        assert losses.dtype == torch.float32
        total.backward()
        expected = by_hand(hidden, weight, targets, upstream)
        found = (losses, hidden.grad, head.weight.grad)
        errors[kind] = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    for chunked, plain in zip(errors["chunked"], errors["plain"], strict=True):
        assert chunked < 1.5 * plain + 1e-6
        assert plain < 0.03


class Largest:
    """The largest tensor that a block makes, and how much is alive at most of what it makes, in elements."""

    def __init__(self):
        self.alive, self.peak, self.largest = 0, 0, 0

    def __enter__(self):
        outer = self

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                        outer.note(tensor)
                return out

        self.known = set()
        self.mode = Mode()
        self.mode.__enter__()
        return self

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes() // 4
        self.known.add(storage._cdata)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key, size):
        self.alive -= size
        self.known.discard(key)

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        gc.collect()


def test_memory_is_a_slice_of_the_logits():
    """Vocabulary 4096, 64 positions: the plain form makes the table of logits several times, this one never."""
    peaks = {}
    for kind in ("plain", "chunked"):
        head = nn.Linear(C, 4096, bias=False)
        hidden, targets = torch.randn(64, C, requires_grad=True), torch.randint(4096, (64,))
        with Largest() as seen:
            head_losses(head, hidden, targets, kind, held=4096)[0].backward()
        peaks[kind] = (seen.largest, seen.peak)
    table = 64 * 4096
    assert peaks["plain"][0] == table
    assert peaks["chunked"][0] == 4096 * C  # the weight's gradient
    assert peaks["chunked"][1] < 2 * 4096 * C + 8 * 4096 < table / 2  # the weight, its gradient, some slices
    assert peaks["plain"][1] > 2 * table


def test_a_head_with_a_bias_is_computed_the_plain_way():
    head, (hidden, _, targets) = nn.Linear(C, V), problem(torch.float32)
    total, losses = head_losses(head, hidden, targets, "chunked", held=1)
    torch.testing.assert_close(losses, F.cross_entropy(head(hidden), targets, reduction="none").detach())
    assert total.grad_fn is not None


def test_few_logits_are_computed_once_and_the_head_is_itself_again(monkeypatch):
    head, (hidden, _, targets) = nn.Linear(C, V, bias=False), problem(torch.float32)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(loss_module, "chunked_losses", None)  # would fail
    head_losses(head, hidden, targets, "chunked", held=N * V)
    monkeypatch.undo()
    head_losses(head, hidden, targets, "chunked", held=N * V - 1)
    assert calls == [1, 1]  # hooks run in both forms
    assert "forward" not in head.__dict__
    assert head(hidden).shape == (N, V)


def test_no_position_at_all():
    head = nn.Linear(C, V, bias=False)
    total, losses = head_losses(
        head, torch.zeros(0, C, requires_grad=True), torch.zeros(0, dtype=torch.long), "chunked"
    )
    total.backward()
    assert total == 0
    assert losses.shape == (0,)
    assert not head.weight.grad.any()


def test_liger_without_liger_is_refused():
    with pytest.raises(ConfigError, match=r"^trainer\.loss: liger (needs liger-kernel|runs on a GPU only)"):
        check_loss("liger")
    for kind in LOSSES[:2]:
        check_loss(kind)


def test_under_zero3_the_head_is_gathered_for_itself_alone():
    """A look at its weight from outside its forward would make the whole model hold it from the first layer on."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, [tests, tests / "models", tests / "support", tests.parent]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", str(tests / "support" / "gathered_head.py")],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]
    assert "gathered 0 of 9 steps in slices 3" in done.stdout


PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "vskip": vskip((1, 2)),
    "fastv": fastv(1, 0.5),
}


def batch_of(model, rows=3, supervised=(3, 5, 0)):
    """Rows with an image, one of them padded; the last is nowhere supervised."""
    image = [int(kind) for kind in model.config.image_token_kinds()]
    length = len(image) + 14
    kinds = torch.full((rows, length), int(TokenKind.TEXT))
    kinds[:, 4 : 4 + len(image)] = torch.tensor(image)
    kinds[1, -3:] = int(TokenKind.PAD)
    ids = torch.randint(4, 320, kinds.shape)
    ids[:, 4 : 4 + len(image)] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(supervised):
        end = length - 3 if row == 1 else length
        labels[row, end - count : end] = ids[row, end - count : end]
    size = model.config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": (kinds != TokenKind.PAD).long(),
        "token_kinds": kinds,
        "labels": labels,
        "pixel_values": torch.randn(rows, 3, size, size),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_the_step_is_the_same_when_the_last_layer_runs_only_where_it_is_read(tiny_config, plan, checkpointing):
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.set_plan(PLANS[plan])
    batch, rows, found = batch_of(model), [], {}
    model.language_model.model.layers[-1].mlp.register_forward_hook(lambda m, a, out: rows.append(out[..., 0].numel()))
    for reads in (False, True):
        model.train_with("plain", reads)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found[reads] = (loss.item(), gradients)
    # The last run computes eight positions (and again where it is checkpointed), the first all of them.
    assert rows[-1] == 8 < rows[0]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    for name, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_packed_rows_and_a_row_that_nobody_reads(tiny_config):
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).train()
    batch = batch_of(model)
    batch["document_ids"] = torch.zeros_like(batch["input_ids"])
    batch["document_ids"][:, -4:] = 1
    batch["document_ids"][1, -3:] = -1
    losses = []
    for reads in (False, True):
        model.train_with("plain", reads)
        losses.append(model(**batch).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_answers_are_those_of_the_stock_model_afterwards(tiny_config):
    """A dense model that is trained so still generates with the stock layers."""
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    batch = batch_of(model)
    del batch["labels"]
    expected = model(**batch).logits
    generated = model.generate(**{k: v[:1] for k, v in batch.items()}, max_new_tokens=5, do_sample=False)
    model.train_with("chunked", True)
    assert torch.equal(model(**batch).logits, expected)
    again = model.generate(**{k: v[:1] for k, v in batch.items()}, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, generated)
