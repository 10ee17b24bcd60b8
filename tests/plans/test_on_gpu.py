"""Attention backends in half precision where they run: on a GPU, if there is one, and their kin on the CPU."""

import copy

import pytest
import torch

from skipvision_train.plans import TokenKind, attach, backends, dense, fastv, skip_ffn, vskip

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WHERE = [
    ("cpu", "runs"),
    ("cpu", "eager"),
    *(
        pytest.param("cuda", name, marks=GPU)
        for name in ("auto", "varlen", "flash_attention_2", "runs", "eager", "flex")
    ),
]
PLANS = [dense(), skip_ffn(), vskip([0, 2]), fastv(1)]


def outputs(kit, model, layout, plan, backend):
    """Logits of real tokens and the gradient of every weight, in fp32 on the CPU."""
    model, device = copy.deepcopy(model), model.device
    real = (layout.kinds != TokenKind.PAD).to(device)
    with attach(model, plan, backend, even_dense=True):
        logits = model(kit.ids_for(layout).to(device), token_layout=layout, use_cache=False).logits.float()[real]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(device)
    (logits * weight).sum().backward()
    return {"logits": logits.detach().cpu()} | {
        name: value.grad.float().cpu() for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize(("device", "backend"), WHERE)
def test_no_less_exact_than_sdpa(kit, device, backend, plan, packed):
    """bf16 against fp32: a wrong mask, scale or order is an error of the size of the values, far above rounding."""
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
    rows = (
        ("ttrryssyttt" * 3, "ttssttyrry." * 3) if packed else ("ttrryssyttt" * 3, "..tt" + "ssttyrrytt" * 2 + "t" * 9)
    )
    owners = [[0] * 15 + [1] * 18, [0] * 11 + [1] * 11 + [2] * 11] if packed else None
    layout = kit.layout_of(*rows, documents=owners)
    model = kit.make_model(head_dim=16, initializer_range=0.1)
    exact = outputs(kit, model, layout, plan, "sdpa")
    half = model.to(device, torch.bfloat16)
    backends.select_backend.cache_clear()
    own, reference = (outputs(kit, half, layout, plan, name) for name in (backend, "sdpa"))
    assert own.keys() == reference.keys() == exact.keys()
    for name, want in exact.items():
        size = want.abs().max()
        error, usual = ((found[name] - want).abs().max() / size for found in (own, reference))
        assert error <= 2 * usual + 0.02, (name, error, usual)
