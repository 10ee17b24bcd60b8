"""Spectral norms, the bound's arithmetic, and the measured errors, each against another way to compute it."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlms import make_family
from watched import Watched, make_ours, our_samples, prompt_embeds, sample_of

from skipvision_train import apply
from skipvision_train.analysis.bounds import (
    ErrorBound,
    SampleErrors,
    error_bound,
    merge_similarity,
    sample_errors,
    skipping_plan,
)
from skipvision_train.analysis.lipschitz import (
    LayerNorms,
    closed_form,
    kl_bound,
    layer_norms,
    similarity_error,
    spectral_norm,
    telescoped,
)
from skipvision_train.analysis.paper_report import Analysis
from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.settings import ReducerConfig, TilingConfig, VisionConfig
from skipvision_train.plans import TokenKind, dense, fastv, skip_ffn, vskip
from skipvision_train.plans.rules import VISUAL

positive = st.floats(1e-3, 1e3)


# --- arithmetic ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 999))
def test_power_iteration_finds_the_largest_singular_value(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = float(torch.linalg.svdvals(weight)[0])
    found = spectral_norm(weight, iterations=3000)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found <= expected * (1 + 1e-5)


def test_norms_that_are_known():
    assert spectral_norm(torch.zeros(3, 5)) == 0
    assert spectral_norm(torch.diag(torch.tensor([3.0, -7.0, 1.0]))) == pytest.approx(7)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))[0]
    assert spectral_norm(rotation) == pytest.approx(1)
    assert spectral_norm(2 * rotation.to(torch.bfloat16)) == pytest.approx(2, rel=0.01)


@given(st.lists(st.tuples(st.floats(0, 1e3), positive), min_size=1, max_size=6))
def test_recursion_equals_the_sum_of_products(layers):
    skipping, factors = ([pair[k] for pair in layers] for k in (0, 1))
    found = telescoped(torch.tensor(skipping, dtype=torch.float64), torch.tensor(factors, dtype=torch.float64))
    for last in range(len(layers)):
        expected = sum(skipping[k] * math.prod(factors[k + 1 : last + 1]) for k in range(last + 1))
        assert 10 ** float(found[last]) == pytest.approx(expected, rel=1e-9)


def test_a_bound_beyond_every_float_and_one_of_nothing():
    found = telescoped(torch.full((400,), 3.0), torch.full((400,), 100.0))
    assert float(found[-1]) == pytest.approx(math.log10(3) + 2 * 399 + math.log10(100 / 99), rel=1e-9)
    assert telescoped(torch.zeros(3), torch.ones(3)).tolist() == [-math.inf] * 3
    assert telescoped(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.0])).tolist() == [
        pytest.approx(math.log10(5)),
        -math.inf,
    ]


@given(st.floats(1e-3, 1e3), st.floats(0.01, 50), st.integers(1, 40))
def test_closed_form_is_the_geometric_sum(skipping, factor, layers):
    expected = skipping * sum(factor**k for k in range(layers))
    assert closed_form(skipping, factor, layers) == pytest.approx(math.log10(expected), abs=1e-9)


def test_closed_form_at_gamma_one_of_nothing_and_beyond_floats():
    assert closed_form(2.0, 1.0, 7) == pytest.approx(math.log10(14))
    assert closed_form(0.0, 2.0, 7) == -math.inf
    assert closed_form(1.0, 10.0, 500) == pytest.approx(500 - math.log10(9))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
def test_closed_form_is_above_the_telescoped_bound(layers):
    skipping, factors = (torch.tensor([pair[k] for pair in layers], dtype=torch.float64) for k in (0, 1))
    closed = closed_form(float(skipping.max()), float(factors.max()), len(layers))
    assert closed >= float(telescoped(skipping, factors)[-1]) - 1e-9


@given(positive, positive, st.floats(0, 1))
def test_kl_bounds(error, variance, theta):
    extra = similarity_error(theta)
    assert extra**2 == pytest.approx(1 - theta)
    plain, whole = kl_bound(math.log10(error), variance), kl_bound(math.log10(error), variance, extra)
    assert 10**plain == pytest.approx(error**2 / (2 * variance))
    assert 10**whole == pytest.approx((error + extra) ** 2 / (2 * variance))
    assert similarity_error(1.0000001) == 0  # a cosine that rounding lifted


def test_constants_of_one_layer_by_hand():
    norms = LayerNorms(query=2, key=3, value=5, gate=7, up=11, down=13, head_dim=16)
    assert norms.attention == 30 / 4
    assert norms.ffn == 13 * 11
    assert LayerNorms(2, 3, 5, gate=12, up=11, down=13, head_dim=16).ffn == 13 * 12
    assert norms.paper == 30 / 4 + 143
    assert norms.residual == (1 + 30 / 4) * 144
    orthogonal = LayerNorms(1, 1, 1, 1, 1, 1, head_dim=16)
    assert (orthogonal.attention, orthogonal.ffn) == (1 / 4, 1)  # Theorem 5.1


# --- measured ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tiny_config):
    return make_ours(tiny_config)[0]


def test_norms_of_a_layer_are_those_of_its_weights(ours):
    layer = ours.language_model.model.layers[1]
    found = layer_norms(layer, iterations=2000)
    parts = {"query": layer.self_attn.q_proj, "key": layer.self_attn.k_proj, "value": layer.self_attn.v_proj}
    parts |= {"gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj, "down": layer.mlp.down_proj}
    for name, module in parts.items():
        expected = float(torch.linalg.matrix_norm(module.weight.detach(), ord=2))
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4)
    assert found.head_dim == 8


@pytest.mark.parametrize("plan", [skip_ffn(), skip_ffn(kinds=VISUAL)], ids=["skipped", "visual"])
def test_errors_are_the_differences_of_two_slow_sequences(ours, plan):
    plan = plan.bind(3)
    for sample in our_samples(ours):
        kinds = sample.inputs["token_kinds"][0]
        embeds = prompt_embeds(ours, sample)
        whole = Watched(ours.language_model, embeds, kinds, dense().bind(3))
        short = Watched(ours.language_model, embeds, kinds, plan)
        found = sample_errors(ours, sample, plan)
        idle = torch.tensor([TokenKind(int(kind)) in plan.rules[0].no_ffn for kind in kinds])
        text = kinds == TokenKind.TEXT
        for layer, (a, b) in enumerate(zip(whole.seen, short.seen, strict=True)):
            difference = a.leaving - b.leaving
            expected = {
                "skipping": b.update[idle].norm(),
                "per_token": b.update[idle].norm(dim=-1).mean(),
                "read": difference[-1].norm(),
                "text": difference[text].norm(),
                "whole": difference.norm(),
            }
            for name, value in expected.items():
                assert float(getattr(found, name)[layer]) == pytest.approx(float(value), rel=2e-3, abs=1e-4), name
        p, q = short.output[-1].softmax(-1), whole.output[-1].softmax(-1)
        assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=5e-3)
        assert found.variance == pytest.approx(float(whole.output[-1].var(correction=0)), rel=1e-3)


def test_behind_the_first_layer_the_error_is_what_was_skipped(ours):
    found = sample_errors(ours, our_samples(ours)[0], skip_ffn().bind(3))
    assert found.whole[0].item() == pytest.approx(found.skipping[0].item(), rel=1e-5)
    assert found.text[0] == found.read[0] == 0
    assert (found.text[1:] > 0).all()


def test_ffns_that_do_nothing_leave_no_error(ours):
    for layer in ours.language_model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    found = error_bound(ours, our_samples(ours), skip_ffn(kinds=VISUAL).bind(3))
    for name in ("skipping", "read", "text", "whole"):
        assert (found.stacked(name) == 0).all()
    data = found.to_dict()
    assert data["kl"]["mean"] == 0
    assert data["log10_bound"] == [None] * 3
    assert found.violations() == 0
    assert [norms.ffn for norms in found.norms] == [0, 0, 0]


def test_a_dense_plan_leaves_no_error(ours):
    found = sample_errors(ours, our_samples(ours)[0], dense().bind(3))
    assert (found.whole == 0).all()
    assert (found.skipping == 0).all()
    assert found.per_token.isnan().all()
    assert found.kl == 0


@cache
def family(name):
    return make_family(name)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_errors_of_other_models(name):
    """States behind all layers but the last, which transformers gives normed."""
    tiny = family(name)
    sample, states = sample_of(tiny.inputs(0)), []
    plan = skipping_plan(dense().bind(3), 3)
    for own in (dense(), plan):
        with torch.no_grad(), apply(tiny.model, own):
            states.append(tiny.model(**sample.inputs, use_cache=False, output_hidden_states=True))
    found = sample_errors(tiny.model, sample, plan)
    for layer in (0, 1):
        difference = (states[0].hidden_states[layer + 1] - states[1].hidden_states[layer + 1])[0]
        assert found.whole[layer].item() == pytest.approx(difference.norm().item(), rel=1e-4)
        assert found.read[layer].item() == pytest.approx(difference[-1].norm().item(), rel=1e-4, abs=1e-6)
    q, p = (out.logits[0, -1].log_softmax(-1) for out in states)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert found.theta is None


def test_bounds_of_made_up_errors():
    """Two layers, two samples; gamma is 3 and 4."""
    norms = [LayerNorms(1, 1, 1, 1, gamma - 1, 1, head_dim=1) for gamma in (3.0, 4.0)]
    errors = [([1.0, 2.0], 5.0, 0.5), ([2.0, 0.0], 9.0, None)]
    samples = [
        SampleErrors(*(torch.tensor(own, dtype=torch.float64) for own in (skip, skip, [0, 1], [0, 1], [1, whole])),
                     variance=2.0, kl=0.1, theta=theta)
        for skip, whole, theta in errors
    ]  # fmt: skip
    bound = ErrorBound("made up", norms, samples)
    assert bound.factors().tolist() == [3, 4]
    assert (10 ** bound.telescoped()).tolist() == [[1, pytest.approx(6)], [2, pytest.approx(8)]]
    assert bound.factors(residual=True).tolist() == [2 * 3, 2 * 4]
    assert [10**value for value in bound.closed()] == [pytest.approx(2 * 5), pytest.approx(2 * 5)]
    assert bound.exceeded().tolist() == [[False, False], [False, True]]  # 9 is above 8
    assert bound.violations() == 1
    assert bound.violations(residual=True) == 0  # and not above 16
    assert bound.to_dict()["violations_by_layer"] == [0, 1]
    assert bound.to_dict()["log10_measured"] == [0, pytest.approx(math.log10(45) / 2)]
    assert bound.kl_violations() == 0
    found = {name: (10**values).tolist() for name, values in bound.kl_bounds().items()}
    assert found["bound"] == [pytest.approx(36 / 4), pytest.approx(64 / 4)]
    assert found["measured"] == [pytest.approx(1 / 4)] * 2
    assert found["bound_with_similarity"] == [pytest.approx((6 + 0.5**0.5) ** 2 / 4), pytest.approx(64 / 4)]
    assert bound.theta() == 0.5
    assert bound.to_dict()["eps_sim"] == pytest.approx(0.5**0.5)


def made_up(skips, wholes, gammas, kl=0.0):
    """One sample per entry of ``skips`` and ``wholes``."""
    norms = [LayerNorms(1, 1, 1, 1, gamma - 1, 1, head_dim=1) for gamma in gammas]
    samples = [
        SampleErrors(*(torch.tensor(own, dtype=torch.float64) for own in (skip, skip, whole, whole, whole)),
                     variance=2.0, kl=kl, theta=None)
        for skip, whole in zip(skips, wholes, strict=True)
    ]  # fmt: skip
    return ErrorBound("made up", norms, samples)


def test_a_bound_counts_as_exceeded_behind_any_layer():
    """gamma is 2: the bounds are 0, 1, 2, 5 and 1, 2, 4, 8; behind the first layer that skips nothing counts."""
    skips, wholes = [[0.0, 1, 0, 1], [1.0, 0, 0, 0]], [[0.1, 1.1, 2.1, 4.9], [1.0, 2.0 + 1e-6, 3.9, 7.9]]
    bound = made_up(skips, wholes, [2.0] * 4)
    assert bound.exceeded().tolist() == [[False, False, True, False], [False] * 4]
    assert (bound.violations(), bound.to_dict()["violations"]) == (1, 1)
    (line,) = [line for line in Analysis(bound=bound).tables().splitlines() if line.startswith("measured above")]
    assert line == "measured above Eq. 10 in 1 of 2 samples, layers 2; above the bound with residuals in 0 of 2 samples"
    wide = made_up([[1.0, 1, 1, 1, 1]] * 2, [[1.0, 9, 99, 1, 999], [1.0, 0, 0, 0, 0]], [2.0] * 5)
    assert "Eq. 10 in 1 of 2 samples, layers 1-2, 4; above" in Analysis(bound=wide).tables()


def test_the_table_has_the_error_beside_its_bounds():
    bound = made_up([[1.0, 1.0], [100.0, 1.0], [1.0, 1.0]], [[1.0, 1e3], [100, 0.1], [1, 1e3]], [1.0, 2.0], kl=10.0)
    lines = Analysis(bound=bound).tables().splitlines()
    assert lines[1].split("  ")[-3:] == ["log10 error", "log10 bound", "with residuals"]
    found = [[float(cell) for cell in line.split()[-3:-1]] for line in lines[2:4]]
    means = [2 / 3, 2 / 3], [5 / 3, (2 * math.log10(3) + math.log10(201)) / 3]
    assert found == [pytest.approx(row, abs=0.006) for row in means]
    assert "measured 10 nats, 10^1.00; bound (Eq. 12)" in lines[-2]
    assert lines[-2].endswith("exceeded in 2 of 3 samples")  # 3^2 / 4, 201^2 / 4 and 3^2 / 4


def weak(config, std, size):
    """Of a model whose matrices have elements of ``std`` and whose tokens are ``size`` times as large."""
    model = make_ours(config)[0]
    torch.manual_seed(0)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        for parameter in (model.language_model.model.embed_tokens.weight, *model.connector.projection.parameters()):
            parameter.mul_(size)
    return error_bound(model, our_samples(model), skip_ffn(kinds=VISUAL).bind(3))


def test_the_paper_bound_is_none_because_it_leaves_out_residual_connections(tiny_config):
    """gamma is 0.06: Eq. 10 forgets what earlier layers did wrong, and the residual stream does not."""
    found = weak(tiny_config, 0.02, 1)
    assert float(found.factors().max()) < 0.1
    assert found.exceeded().tolist() == [[False, True, True]] * 2
    assert found.violations(residual=True) == 0


def test_with_residuals_it_is_none_because_it_leaves_out_norms(tiny_config):
    """States far below a mean square of 1 are enlarged by the norms that the sublayers read through."""
    found = weak(tiny_config, 0.02, 0.001)
    assert found.violations(residual=True) == 2
    assert found.exceeded(residual=True)[:, -1].all()


def test_which_plan_is_compared():
    own = skip_ffn().bind(3)
    assert skipping_plan(own, 3) is own
    assert skipping_plan(dense().bind(3), 3) == skip_ffn(kinds=VISUAL, evict=()).bind(3)
    for wrong in (vskip([0]), fastv(1, 0.5)):
        with pytest.raises(ConfigError, match="plan: the bound is about skipped FFNs"):
            skipping_plan(wrong.bind(3), 3)


# --- theta ---------------------------------------------------------------------------------------------------------


def slow_theta(tokens, keep):
    """Merging in loops (Sec. 4.1): the most distinctive stay, every other goes to the one it is most like."""
    unit = [token / token.norm() for token in tokens]
    cosine = [[float(a @ b) for b in unit] for a in unit]
    mean = [sum(row[k] for k in range(len(row)) if k != i) for i, row in enumerate(cosine)]
    stay = sorted(range(len(tokens)), key=lambda i: mean[i])[:keep]
    return [max(cosine[i][k] for k in stay) for i in range(len(tokens)) if i not in stay]


SETTINGS = {
    "finest": {},
    "saliency": {
        "connector": MlpConfig(layers=1),
        "reducer": ReducerConfig(split="saliency", retain=20, local_keep=9, former_over="retained"),
    },
    "tiles": {
        "connector": MlpConfig(layers=1, pool=2),
        "tiling": TilingConfig(mode="aspect", max_tiles=3),
        "reducer": ReducerConfig(split="tiles", local_keep=9, former_over="retained"),
    },
}


@pytest.mark.parametrize("split", SETTINGS)
@torch.no_grad()
def test_theta_is_the_mean_similarity_of_what_is_merged(config_factory, split):
    vision = VisionConfig(image_size=32, patch_size=4, width=32, layers=3, heads=2, depths=(2,))
    settings = SETTINGS[split] if split == "finest" else {"vision": vision, **SETTINGS[split]}
    model, _ = make_ours(config_factory(**settings))
    tiles = [3, 4] if split == "tiles" else [1, 1]
    pixels = torch.randn(sum(tiles), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "pixel_values": pixels}
    if split == "tiles":
        inputs["image_tiles"] = torch.tensor(tiles)
    features = model.vision_tower(pixels)
    levels = model.connector(features)
    if split == "finest":
        local = list(levels[-1])
    elif split == "saliency":
        order = [sorted(range(64), key=lambda i, own=own: -float(own[i])) for own in features.saliency]
        local = [image[sorted(best[20:])] for image, best in zip(levels[0], order, strict=True)]
    else:
        local = [levels[0][1:3].flatten(0, 1), levels[0][4:7].flatten(0, 1)]
    keep = model.config.reducer_config.local_keep
    values = [value for tokens in local for value in slow_theta(tokens, keep)]
    assert merge_similarity(model, sample_of(inputs)) == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_without_merging_there_is_no_theta(config_factory):
    model, _ = make_ours(config_factory(reducer=ReducerConfig(local_keep=None)))
    assert merge_similarity(model, our_samples(model)[0]) is None
    model, _ = make_ours(config_factory(reducer=ReducerConfig(local_keep=16)))
    assert merge_similarity(model, our_samples(model)[0]) is None
