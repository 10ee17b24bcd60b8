"""Oracles 5 and 10: any plan on any layout equals a slow reference, outputs and gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.plans import Drop, LayerRule, SkipPlan, TokenKind, TokenLayout, attach
from skipvision_train.plans.rules import BYPASSES, POSITIONS, ROUNDINGS

REAL = [TokenKind.TEXT, TokenKind.RETAINED, TokenKind.SKIPPED, TokenKind.SUMMARY]
KIND_SETS = st.frozensets(st.sampled_from(REAL), max_size=3)


@st.composite
def rules(draw):
    return LayerRule(draw(KIND_SETS), draw(KIND_SETS), draw(st.sampled_from(BYPASSES)))


@st.composite
def drops(draw, layers, packed):
    """One drop per layer of ``layers``, all of the same kinds and position policy."""
    kinds = draw(st.frozensets(st.sampled_from([TokenKind.RETAINED, TokenKind.SKIPPED]), min_size=1))
    positions = draw(st.sampled_from(POSITIONS))
    scores = ["last_token"] if packed else ["last_token", "raters", "corrected_raters"]
    found = []
    for layer in layers:
        keep = draw(st.one_of(st.integers(0, 4), st.floats(0.01, 1)))
        weights = "own" if layer == 0 else draw(st.sampled_from(["own", "previous"]))
        recycle = not packed and keep > 0 and draw(st.booleans())
        score, rounding = draw(st.sampled_from(scores)), draw(st.sampled_from(ROUNDINGS))
        found.append(Drop(layer, keep, kinds, score, weights, positions, rounding, recycle))
    return tuple(found)


@st.composite
def dropping_plans(draw, packed):
    """Three layers with one to three drops, and rules that concern all ranked kinds or none of them."""
    found = draw(drops(draw(st.sampled_from([(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])), packed))
    ranked = found[0].kinds
    whole = st.sampled_from([frozenset(), ranked, ranked | {TokenKind.SUMMARY}, frozenset({TokenKind.SUMMARY})])
    three = [LayerRule(draw(whole), draw(whole), draw(st.sampled_from(BYPASSES))) for _ in range(3)]
    return SkipPlan("random", tuple(three), drops=found)


@st.composite
def layouts(draw, packed=None):
    """One to three rows of one to three documents of random kinds, padded left and right to a common length."""
    packed = draw(st.booleans()) if packed is None else packed
    documents = st.lists(
        st.lists(st.sampled_from(REAL), min_size=1, max_size=9), min_size=1, max_size=3 if packed else 1
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


def check_against_the_slow_reference(kit, model, layout, plan, seed):
    """Outputs at real tokens and the gradients of all parameters."""
    ids = kit.ids_for(layout, seed)
    real = layout.kinds != TokenKind.PAD
    weight = torch.randn(*ids.shape, 40, generator=torch.Generator().manual_seed(seed)) * real[..., None]

    logits = kit.logits_of(model, ids, layout, plan)
    expected = kit.slow_logits(model, ids, layout, plan)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[real], expected[real], atol=3e-5, rtol=1e-4)

    parameters = list(model.parameters())
    got = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for (name, parameter), a, b in zip(model.named_parameters(), got, want, strict=True):
        a = torch.zeros_like(parameter) if a is None else a
        b = torch.zeros_like(parameter) if b is None else b
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, atol=5e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=60)
@given(layout=layouts(), plan_rules=st.lists(rules(), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_rules_equal_the_slow_reference(kit, shared_model, layout, plan_rules, seed):
    check_against_the_slow_reference(kit, shared_model, layout, SkipPlan("random", tuple(plan_rules)), seed)


@settings(max_examples=80)
@given(data=st.data(), packed=st.booleans(), seed=st.integers(0, 99))
def test_drops_equal_the_slow_reference(kit, shared_model, data, packed, seed):
    layout = data.draw(layouts(packed))
    if data.draw(st.booleans()):  # training: some tokens ask, in some documents none
        asking = data.draw(st.lists(st.booleans(), min_size=layout.kinds.numel(), max_size=layout.kinds.numel()))
        asking = torch.tensor(asking).view_as(layout.kinds) & (layout.kinds != TokenKind.PAD)
        layout = TokenLayout.from_kinds(layout.kinds, layout.document_ids, asking)
    check_against_the_slow_reference(kit, shared_model, layout, data.draw(dropping_plans(packed)), seed)


@pytest.mark.parametrize("positions", POSITIONS)
def test_many_recycled_clusters_equal_the_slow_reference(kit, shared_model, positions):
    """Enough tokens leave for several clusters, twice."""
    layout = kit.layout_of("tt" + "r" * 90 + "tttt", "." * 20 + "t" + "s" * 40 + "tt" + "r" * 30 + "ttt")
    drop = Drop(1, 50, score="raters", positions=positions, recycle=True)
    plan = SkipPlan("recycle", (LayerRule(),) * 3, drops=(drop, replace(drop, layer=2, keep=9)))
    check_against_the_slow_reference(kit, shared_model, layout, plan, 0)


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
