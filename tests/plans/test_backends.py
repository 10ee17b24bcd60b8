"""Attention backends: each equals ``sdpa``, and is called as its library wants it."""

import inspect
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_attention import FAKES, Fakes, logits_under, standing_in
from torch.nn.attention import varlen
from transformers import DynamicCache

from skipvision_train.plans import (
    Drop,
    LayerRule,
    SkipPlan,
    TokenKind,
    TokenLayout,
    attach,
    backends,
    dense,
    fastv,
    shortv,
    skip_ffn,
    visibility,
    vskip,
    vtw,
)
from skipvision_train.plans.layout import is_kind
from skipvision_train.plans.stages import Census, LiveTokens, pick, select_queries

CPU = torch.device("cpu")
T, R, S, Y = TokenKind.TEXT, TokenKind.RETAINED, TokenKind.SKIPPED, TokenKind.SUMMARY
IMAGES_IN_TEXT = ("ttrryssytttrrtt", "....ttsssttrryt")
ANYWHERE = [(name, "varlen") for name in ("eager", "runs", "flex")]
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


def test_the_stand_in_has_the_real_signature():
    real = inspect.signature(varlen.varlen_attn).parameters
    fake = inspect.signature(Fakes().varlen).parameters
    needed = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(real)[:7] == list(fake)[:7] == needed
    assert {"scale", "window_size"} <= set(real)  # since torch 2.11; enable_gqa came later


def test_the_installed_varlen_takes_the_call(kit):
    """On meta tensors the real function runs up to its kernel."""
    layout, meta = kit.layout_of(*IMAGES_IN_TEXT), torch.device("meta")
    queries = selected(layout, frozenset({S}))
    assert queries.segments is not None
    queries = replace(queries, segments=queries.segments.to(meta))
    attention = kit.make_model().model.layers[0].self_attn
    query = torch.empty(len(queries.index), 4, 8, dtype=torch.bfloat16, device=meta)
    key = torch.empty(2, 15, 2, 8, dtype=torch.bfloat16, device=meta)
    assert backends._load("varlen").kernel(attention, query, key, key, queries).shape == query.shape


# --- equal to sdpa ---------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """One to three rows, of one document or packed, with several images, padded left and right."""
    document = st.lists(st.sampled_from([T, T, R, S, Y]), min_size=1, max_size=10)
    row = st.lists(document, min_size=1, max_size=draw(st.sampled_from([1, 3])))
    rows = draw(st.lists(row, min_size=1, max_size=3))
    length = max(sum(map(len, row)) for row in rows) + draw(st.integers(0, 2))
    kinds, owners = [], []
    for row in rows:
        flat = [kind for document in row for kind in document]
        left = draw(st.integers(0, length - len(flat)))
        kinds.append([TokenKind.PAD] * left + flat + [TokenKind.PAD] * (length - len(flat) - left))
        owner = [i for i, document in enumerate(row) for _ in document]
        owners.append([-1] * left + owner + [len(row)] * (length - len(flat) - left))
    packed = any(len(row) > 1 for row in rows) or draw(st.booleans())
    return TokenLayout.from_kinds(torch.tensor(kinds), torch.tensor(owners) if packed else None)


@st.composite
def plans(draw):
    """Three layers of random rules, and a drop, ranked or not, in some."""
    kinds = st.frozensets(st.sampled_from([T, R, S, Y]), max_size=2)
    bypass = st.sampled_from(["zero", "norm"])
    renumbering = (Drop(1, 2, positions="renumber"), Drop(2, positions="renumber"))
    found = draw(st.sampled_from([(), (Drop(0),), (Drop(1),), (Drop(1, 0.5),), renumbering]))
    if found:
        kinds = st.sampled_from([frozenset(), frozenset({T}), frozenset({Y}), frozenset({R, S, TokenKind.MIDDLE})])
    three = tuple(LayerRule(draw(kinds), draw(kinds), draw(bypass)) for _ in range(3))
    return SkipPlan("random", three, drops=found)


def check_equal(kit, model, layout, plan, backend, gradients=True):
    """Measured in fp32 on 300 cases: outputs up to 7e-6, gradients up to 8e-6 of the largest one of a parameter."""
    real = layout.kinds != TokenKind.PAD
    weight = torch.randn(*real.shape, 40, generator=torch.Generator().manual_seed(0)) * real[..., None]
    results = [logits_under(kit, model, layout, plan, name) for name in (backend, "sdpa")]
    torch.testing.assert_close(results[0][real], results[1][real], atol=2e-5, rtol=1e-5)
    if not gradients:
        return
    parameters = dict(model.named_parameters())
    got, want = (
        torch.autograd.grad((result * weight).sum(), list(parameters.values()), allow_unused=True) for result in results
    )
    for name, a, b in zip(parameters, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            largest = max(1.0, b.abs().max().item())
            assert (a - b).abs().max() <= 5e-5 * largest, name


@pytest.mark.parametrize("backend", ["eager", "runs"])
@settings(max_examples=60)
@given(layout=layouts(), plan=plans())
def test_equal_to_sdpa(kit, wide, backend, layout, plan):
    check_equal(kit, wide, layout, plan, backend)


@pytest.mark.parametrize("fake", FAKES)
@settings(max_examples=30)
@given(layout=layouts(), plan=plans())
def test_runs_of_queries_equal_sdpa(kit, wide, fake, layout, plan):
    """The runs say what the mask says: any kernel that computes a run right gives the right result."""
    backend, function = FAKES[fake]
    with standing_in(getattr(Fakes(), function)):
        check_equal(kit, wide, layout, plan, backend)


@pytest.mark.filterwarnings(UNCOMPILED)
@settings(max_examples=10)
@given(layout=layouts(), plan=plans())
def test_flex_equals_sdpa(kit, wide, layout, plan):
    with torch.no_grad():
        check_equal(kit, wide, layout, plan, "flex", gradients=False)


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize(("backend", "function"), [*FAKES.values(), *ANYWHERE])
def test_the_attention_scale_is_the_layers_own(kit, backend, function):
    model = kit.make_model(head_dim=8)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.1
    with standing_in(getattr(Fakes(), function)), torch.no_grad():
        check_equal(kit, model, kit.layout_of(*IMAGES_IN_TEXT), vskip([0, 1, 2]), backend, gradients=False)


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("backend", ["eager", "varlen", "flash_attention_2", "runs", "flex"])
def test_half_precision_under_autocast(kit, wide, backend):
    """The rotation turns queries and keys into fp32 there, values are bf16; the kernels get one type."""
    layout, fakes = kit.layout_of(*IMAGES_IN_TEXT), Fakes()
    function = fakes.flash if backend == "flash_attention_2" else fakes.varlen
    with standing_in(function, (torch.bfloat16,)), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (logits_under(kit, wide, layout, vskip([0, 1, 2]), name) for name in (backend, "sdpa"))
        exact = logits_under(kit, wide, layout, vskip([0, 1, 2]), "sdpa")
    text = layout.kinds == T
    errors = [(result - exact)[text].abs().max() for result in (a, b)]
    assert errors[0] < 2 * errors[1] + 0.05  # no worse than what autocast costs sdpa
    assert len(fakes.calls) == (3 if backend in ("varlen", "flash_attention_2") else 0)


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("backend", ["eager", "varlen", "runs", "flex"])
def test_an_image_onto_a_filled_cache(kit, wide, backend):
    """There are no runs there: packed backends take the mask."""
    layout, fakes = kit.layout_of("ttrrytssytt", "..ttrrtssyt"), Fakes()
    ids = kit.ids_for(layout)
    results = []
    with standing_in(fakes.varlen), torch.no_grad():
        for name in (backend, "sdpa"):
            with attach(wide, vskip([0, 2]), name):
                cache = DynamicCache(config=wide.config)
                wide(ids[:, :5], token_layout=layout.columns(0, 5), past_key_values=cache)
                calls = len(fakes.calls)
                second = layout.columns(5, 11)
                mask, positions = layout.attention_mask, second.position_ids
                more = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
                results.append(wide(ids[:, 5:], token_layout=second, **more).logits)
                assert len(fakes.calls) == calls
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", [dense(), skip_ffn(), fastv(1)], ids=lambda plan: plan.name)
def test_packed_documents_never_meet_a_mask(kit, wide, plan, monkeypatch):
    """Also in layers that a plan leaves alone: their attention runs in runs, and the T x T mask is never made."""
    layout = kit.layout_of("ttrryssyttt", "ttssttyrryt", documents=[[0] * 7 + [1] * 4, [0] * 4 + [1] * 7])
    want = logits_under(kit, wide, layout, plan, "sdpa")
    masked = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(TokenLayout, "visible", masked)
    monkeypatch.setattr(visibility.Sight, "mask", masked)
    with attach(wide, plan, even_dense=True):
        got = wide(kit.ids_for(layout), token_layout=layout, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_attention_maps_of_packed_documents(kit):
    model = kit.make_model()
    model.set_attn_implementation("eager")
    layout = kit.layout_of("ttrryssyttt", documents=[[0] * 7 + [1] * 4])
    with torch.no_grad(), attach(model, skip_ffn()):
        maps = model(kit.ids_for(layout), token_layout=layout, output_attentions=True, use_cache=False).attentions
    assert len(maps) == 3
    sees = layout.visible()
    for found in maps:
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 4, 11))
        assert not found[~sees[:, None].expand_as(found)].any()


# --- runs ------------------------------------------------------------------------------------------------------------


def selected(layout, silent, form="segments"):
    census, live = Census(layout), LiveTokens.whole(layout)
    asking = [a - b for a, b in zip(census.live(), census.live(silent), strict=True)]
    return select_queries(
        live, live.real & ~is_kind(live.kinds, silent), asking, CPU, None, form, census.live_documents()
    )


def test_runs_by_hand(kit):
    """Two documents in a row that begins with padding; a second row of which nobody is silent."""
    layout = kit.layout_of(".ttssttst", "ttt......", documents=[[0, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 3 + [1] * 6])
    queries = selected(layout, frozenset({S}))
    runs = queries.segments
    assert queries.mask is None
    assert queries.index.tolist() == [1, 2, 5, 6, 8, 9, 10, 11]
    assert runs.cu_seqlens_q.tolist() == [0, 2, 3, 4, 5, 8]
    assert runs.cu_seqlens_k.tolist() == [0, 2, 7, 8, 11, 14]
    assert runs.key_index.tolist() == [1, 2, *range(1, 6), 6, 6, 7, 8, 9, 10, 11]
    assert (runs.max_q, runs.max_k) == (3, 5)


def whole_documents(layout, form="segments"):
    """What is selected where a drop has left everybody asking."""
    census, live = Census(layout), LiveTokens.whole(layout)
    lengths = census.live()
    live = live.select(pick(live.real, lengths), lengths)
    return select_queries(live, live.real, lengths, CPU, None, form, census.live_documents())


def test_whole_documents_share_their_bounds(kit):
    """torch picks cuDNN, which aligns at the top left, if it is handed the very same tensor twice."""
    layout = kit.layout_of("ttrtt..", "..trttt", documents=[[0, 0, 1, 1, 1, 2, 2], [9, 9, 0, 0, 0, 0, 0]])
    runs = whole_documents(layout).segments
    moved = runs.to(torch.device("meta"))
    assert runs.cu_seqlens_q is runs.cu_seqlens_k
    assert moved.cu_seqlens_q is moved.cu_seqlens_k
    assert runs.cu_seqlens_q.tolist() == [0, 2, 5, 10]
    assert (runs.max_q, runs.max_k, runs.key_index) == (5, 5, None)
    ragged = whole_documents(kit.layout_of("tt..", ".ttt")).segments
    assert ragged.key_index.tolist() == [0, 1, 3, 4, 5]
    other = selected(kit.layout_of("ttsst"), frozenset({S})).segments
    assert other.cu_seqlens_q is not other.cu_seqlens_k
    last = selected(kit.layout_of("sstt"), frozenset({S})).segments
    assert (last.cu_seqlens_q.tolist(), last.cu_seqlens_k.tolist(), last.key_index) == ([0, 2], [0, 4], None)


def test_too_many_copies_of_the_keys_leave_the_mask(kit):
    """Every run copies the keys before it: n runs of one query, n / 2 times all keys."""
    few = kit.layout_of("ts" * visibility.MAX_KEY_COPIES)
    many = kit.layout_of("ts" * (3 * visibility.MAX_KEY_COPIES))
    assert selected(few, frozenset({S})).mask is None
    assert selected(few, frozenset({S})).segments is not None
    assert selected(many, frozenset({S})).segments is None
    assert selected(many, frozenset({S})).mask is not None


def test_nobody_asks(kit, wide):
    layout = kit.layout_of("ss.", ".s.")
    assert selected(layout, frozenset({S})).segments is None
    fakes = Fakes()
    with standing_in(fakes.varlen):
        check_equal(kit, wide, layout, SkipPlan("off", (LayerRule(frozenset({S})),) * 3), "varlen")
    assert not fakes.calls


def test_a_single_last_query_needs_no_mask(kit):
    layout = kit.layout_of("rrst", "rsst")
    queries = selected(layout, frozenset({R, S}), "mask")
    assert (queries.mask, queries.causal, queries.width) == (None, False, 1)
    for rows in (("rrst", "rst."), ("rrst", ".rst"), ("rtrs", "rtrs")):
        assert selected(kit.layout_of(*rows), frozenset({R, S}), "mask").mask is not None
    assert selected(layout, frozenset({R}), "mask").mask is not None


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_single_last_query_sees_everything(kit, wide, backend):
    """Padding in front makes a mask necessary, and changes nothing else."""
    bare, padded = kit.layout_of("rrst", "rsst"), kit.layout_of(".rrst", ".rsst")
    ids = kit.ids_for(padded)
    with attach(wide, vskip([0, 1, 2]), backend):
        a = wide(ids[:, 1:], token_layout=bare, use_cache=False).logits
        b = wide(ids, token_layout=padded, use_cache=False).logits[:, 1:]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["mask", "segments"])
def test_selecting_never_waits_for_a_device(kit, form, packed):
    """After a ranked drop the tokens are on the device alone: meta tensors refuse to be looked at."""
    documents = [[0, 0, 0, 0, 1, 1, 1]] * 2 if packed else None
    layout, meta = kit.layout_of("ttrstrt", ".tsrstt", documents=documents), torch.device("meta")
    census, live = Census(layout), LiveTokens.whole(layout)
    lengths = census.live()
    live = live.select(pick(live.real, lengths), lengths).to(meta)
    some = [n - m for n, m in zip(lengths, census.live(frozenset({R})), strict=True)]
    queries = select_queries(
        live, live.real & ~is_kind(live.kinds, frozenset({R})), some, meta, None, form, census.live_documents()
    )
    assert queries.segments is None
    assert queries.mask.shape == (2, 1, max(some), 7)
    everybody = select_queries(live, live.real, lengths, meta, None, form, census.live_documents())
    assert (everybody.segments is not None) == (form == "segments")
    assert (everybody.mask is not None) == (form == "mask" and packed)


def test_only_layers_under_the_plan_use_the_backend(kit, wide):
    layout = kit.layout_of(*IMAGES_IN_TEXT)
    for plan, calls in ((vskip([1]), 1), (vtw(1), 2), (fastv(1, 2), 2), (skip_ffn(evict=()), 0), (shortv([0, 2]), 2)):
        fakes = Fakes()
        with standing_in(fakes.varlen):
            logits_under(kit, wide, layout, plan, "varlen")
        assert len(fakes.calls) == calls, plan.name
