"""Oracles 5 and 10: any plan on any layout equals a slow reference, outputs and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.plans import LayerRule, SkipPlan, TokenKind, TokenLayout, attach
from skipvision_train.plans.plan import BYPASSES

REAL = [TokenKind.TEXT, TokenKind.RETAINED, TokenKind.SKIPPED, TokenKind.SUMMARY]
KIND_SETS = st.frozensets(st.sampled_from(REAL), max_size=3)


@st.composite
def rules(draw):
    return LayerRule(draw(KIND_SETS), draw(KIND_SETS), draw(st.sampled_from(BYPASSES)))


@st.composite
def layouts(draw):
    """One to three rows of one to three documents of random kinds, padded left and right to a common length."""
    packed = draw(st.booleans())
    documents = st.lists(
        st.lists(st.sampled_from(REAL), min_size=1, max_size=7), min_size=1, max_size=3 if packed else 1
    )
    rows = draw(st.lists(documents, min_size=1, max_size=3))
    length = max(sum(map(len, row)) for row in rows) + draw(st.integers(0, 2))
    kinds, owners = [], []
    for row in rows:
        flat = [kind for document in row for kind in document]
        owner = [i for i, document in enumerate(row) for _ in document]
        left = draw(st.integers(0, length - len(flat)))
        right = length - len(flat) - left
        kinds.append([TokenKind.PAD] * left + flat + [TokenKind.PAD] * right)
        owners.append([-1] * left + owner + [len(row)] * right)
    return TokenLayout.from_kinds(torch.tensor(kinds), torch.tensor(owners) if packed else None)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), plan_rules=st.lists(rules(), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_logits_and_gradients_equal_the_slow_reference(kit, shared_model, layout, plan_rules, seed):
    model, ids = shared_model, kit.ids_for(layout, seed)
    plan = SkipPlan("random", tuple(plan_rules))
    real = layout.kinds != TokenKind.PAD
    weight = torch.randn(*ids.shape, 40, generator=torch.Generator().manual_seed(seed)) * real[..., None]

    logits = kit.logits_of(model, ids, layout, plan)
    expected = kit.slow_logits(model, ids, layout, plan)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[real], expected[real], atol=2e-5, rtol=1e-4)

    parameters = list(model.parameters())
    got = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for (name, parameter), a, b in zip(model.named_parameters(), got, want, strict=True):
        a = torch.zeros_like(parameter) if a is None else a
        b = torch.zeros_like(parameter) if b is None else b
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, atol=5e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_every_parameter_takes_part_even_when_no_token_is_active(kit, model):
    """Distributed training waits for the gradient of every parameter, in a batch of skipped tokens too."""
    layout = kit.layout_of("ss.", ".s.")
    rule = LayerRule(no_attention=frozenset(REAL), no_ffn=frozenset(REAL))
    with attach(model, SkipPlan("all off", (rule,) * 3)):
        logits = model(kit.ids_for(layout), token_layout=layout, use_cache=False).logits
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
