"""Which attention backend is chosen where, and what is refused."""

import logging
import sys
import types
from unittest import mock

import pytest
import torch
from packed_attention import Fakes, logits_under, standing_in

from skipvision_train.errors import PlanError
from skipvision_train.plans import attach, backends, dense, vskip

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES_IN_TEXT = ("ttrryssytttrrtt", "....ttsssttrryt")
UNCOMPILED = "ignore:flex_attention called without torch.compile"  # on purpose: there is no compiler on a bare CPU


@pytest.fixture(autouse=True)
def fresh_choice():
    backends.select_backend.cache_clear()
    yield
    backends.select_backend.cache_clear()


@pytest.fixture(scope="module")
def wide(kit):
    """Heads as wide as flash attention wants them, two query heads for a key head."""
    return kit.make_model(head_dim=8)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "dropout", "capability", "missing", "expected"),
    [
        (CPU, torch.float32, 128, 0.0, None, (), "sdpa"),
        (CPU, torch.bfloat16, 128, 0.0, None, (), "sdpa"),
        (CUDA, torch.float32, 128, 0.0, (9, 0), (), "sdpa"),
        (CUDA, torch.bfloat16, 128, 0.0, (9, 0), (), "varlen"),
        (CUDA, torch.float16, 64, 0.0, (8, 0), (), "varlen"),
        (CUDA, torch.bfloat16, 128, 0.0, (9, 0), ("varlen",), "flash_attention_2"),
        (CUDA, torch.bfloat16, 128, 0.0, (9, 0), ("varlen", "flash"), "sdpa"),
        (CUDA, torch.bfloat16, 128, 0.1, (9, 0), (), "flash_attention_2"),
        (CUDA, torch.bfloat16, 128, 0.1, (9, 0), ("flash",), "sdpa"),
        (CUDA, torch.float16, 128, 0.0, (7, 5), (), "sdpa"),
        (CUDA, torch.bfloat16, 288, 0.0, (9, 0), (), "sdpa"),
        (CUDA, torch.bfloat16, 12, 0.0, (9, 0), (), "sdpa"),
    ],
)
def test_auto(monkeypatch, device, dtype, head_dim, dropout, capability, missing, expected):
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_varlen_func = Fakes().flash
    monkeypatch.setitem(sys.modules, "flash_attn", None if "flash" in missing else flash)
    if "varlen" in missing:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.select_backend("auto", device, dtype, head_dim, dropout).name == expected


@pytest.mark.parametrize(("device", "dtype", "expected"), [(CPU, torch.float32, "runs"), (CUDA, torch.float32, "sdpa")])
def test_auto_for_packed_documents(device, dtype, expected):
    assert backends.select_backend("auto", device, dtype, 128, 0.0, has_documents=True).name == expected


def test_auto_imports_flash_attn_only_where_it_could_run(monkeypatch):
    monkeypatch.setattr(backends, "_load", mock.Mock(side_effect=AssertionError))
    assert backends.select_backend("auto", CPU, torch.bfloat16, 64, 0.0).name == "sdpa"


def test_the_choice_is_logged_once(kit, wide, caplog):
    layout = kit.layout_of(*IMAGES_IN_TEXT)
    with caplog.at_level(logging.INFO, "skipvision_train.plans.backends"), attach(wide, vskip([0, 1])):
        for _ in range(3):
            wide(kit.ids_for(layout), token_layout=layout, use_cache=False)
    assert [r.getMessage() for r in caplog.records] == [
        "Attention of layers under a plan: sdpa (asked for: auto; cpu, torch.float32)"
    ]


def test_an_unknown_backend_is_refused(wide):
    with pytest.raises(
        PlanError, match="'falsh' is unknown; use one of auto, sdpa, eager, varlen, flash_attention_2, "
    ):
        attach(wide, dense(), "falsh")


def test_a_backend_that_is_not_installed_is_refused(wide, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(PlanError, match=r"'flash_attention_2': .*flash_attn.*; install flash-attn .*, or use 'auto'"):
        attach(wide, vskip([0]), "flash_attention_2")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(PlanError, match=r"'varlen': .*; install a newer torch, or use"):
        attach(wide, vskip([0]), "varlen")
    assert "_stock_forward" not in wide.model.__dict__


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((CPU, torch.bfloat16, 64, None), "runs on cuda, the inputs are on cpu; use 'auto' or 'sdpa'"),
        ((CUDA, torch.float32, 64, (9, 0)), "computes in float16 or bfloat16, this model in float32"),
        ((CUDA, torch.bfloat16, 20, (9, 0)), "takes heads of a width up to 256 that 8 divides, this model's have 20"),
        ((CUDA, torch.float16, 64, (7, 5)), r"needs a GPU of compute capability \(8, 0\), this one has \(7, 5\)"),
    ],
)
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_where_packed_backends_cannot_run(monkeypatch, name, case, message):
    device, dtype, head_dim, capability = case
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(PlanError, match=f"'{name}': {message}"):
        backends.select_backend(name, device, dtype, head_dim, 0.0)


def test_a_forward_on_the_cpu_refuses_varlen(kit, wide):
    layout = kit.layout_of(*IMAGES_IN_TEXT)
    with attach(wide, vskip([0]), "varlen"), pytest.raises(PlanError, match="'varlen': runs on cuda"):
        wide(kit.ids_for(layout), token_layout=layout)


@pytest.mark.filterwarnings(UNCOMPILED)
def test_flex_has_no_backward_on_the_cpu(kit, wide):
    layout = kit.layout_of(*IMAGES_IN_TEXT)
    with pytest.raises(PlanError, match="'flex': torch has no backward of it on the CPU; use 'sdpa' or 'eager'"):
        logits_under(kit, wide, layout, vskip([0]), "flex")


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_dropout_where_there_is_none(kit, backend):
    model, layout, fakes = kit.make_model(head_dim=8, attention_dropout=0.5), kit.layout_of(*IMAGES_IN_TEXT), Fakes()
    with standing_in(fakes.varlen), torch.no_grad():
        expected = logits_under(kit, model, layout, vskip([0]), "sdpa")
        got = logits_under(kit, model, layout, vskip([0]), "varlen")
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        with pytest.raises(PlanError, match=f"'{backend}' has no dropout.*attention_dropout=0.5; set it to 0, or use"):
            logits_under(kit, model.train(), layout, vskip([0]), backend)


def test_dropout_where_there_is_some(kit):
    model, layout, fakes = kit.make_model(head_dim=8, attention_dropout=0.5), kit.layout_of(*IMAGES_IN_TEXT), Fakes()
    with standing_in(fakes.flash), torch.no_grad():
        still = logits_under(kit, model, layout, vskip([0, 1, 2]), "eager")
        logits_under(kit, model, layout, vskip([0, 1, 2]), "flash_attention_2")
        assert fakes.dropout == 0
        model.train()
        logits_under(kit, model, layout, vskip([0, 1, 2]), "flash_attention_2")
        assert fakes.dropout == 0.5
        torch.manual_seed(0)
        first, second = (logits_under(kit, model, layout, vskip([0, 1, 2]), "eager") for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, still)
