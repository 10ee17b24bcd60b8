"""The resampler against a slow computation, one window and one query at a time, from the state dict alone.

fp32, outputs of size about 1: measured difference at most 1e-6, tolerance 1e-5.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.resampler import MultiScaleResampler, split_windows

GRID, WIDTH, HEAD_DIM, OUT = 8, 12, 4, 10
CONFIG = ResamplerConfig(windows=(8, 4, 2), queries=(3, 8, 32), head_dim=HEAD_DIM)


def resampler(depths: int = 2, config: ResamplerConfig = CONFIG, std: float = 0.3) -> MultiScaleResampler:
    torch.manual_seed(0)
    model = MultiScaleResampler(config, GRID, WIDTH, depths, OUT)
    for parameter in model.parameters():  # biases and LayerNorms too, so that none of them can be forgotten
        torch.nn.init.normal_(parameter, std=std)
    return model


def features(depths: int = 2, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, GRID * GRID, WIDTH) for _ in range(depths)]


def slow_token(state: dict[str, torch.Tensor], prefix: str, query: torch.Tensor, patches: list[list[torch.Tensor]]):
    """One query of one window of one image: ``patches`` holds the window's vectors for every depth."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    for depth, vectors in enumerate(patches):
        block = f"{prefix}blocks.{depth}."
        q = state[block + "attention.query.weight"] @ norm(block + "attention.norm_query", query)
        kv = [state[block + "attention.key_value.weight"] @ norm(block + "attention.norm_features", x) for x in vectors]
        heads = []
        for h in range(0, WIDTH, HEAD_DIM):
            scores = [float(q[h : h + HEAD_DIM] @ x[h : h + HEAD_DIM]) * HEAD_DIM**-0.5 for x in kv]
            total = sum(math.exp(s) for s in scores)
            values = [x[WIDTH + h : WIDTH + h + HEAD_DIM] for x in kv]
            heads.append(sum(math.exp(s) / total * v for s, v in zip(scores, values, strict=True)))
        out = state[block + "attention.out.weight"] @ torch.cat(heads) + state[block + "attention.out.bias"]
        query = query + out
        hidden = state[block + "mlp.1.weight"] @ norm(block + "mlp.0", query) + state[block + "mlp.1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        query = query + state[block + "mlp.3.weight"] @ hidden + state[block + "mlp.3.bias"]
    return state["projection.weight"] @ norm("norm", query) + state["projection.bias"]


@torch.no_grad()
def test_equals_the_slow_computation():
    model, inputs = resampler(), features()
    state = dict(model.state_dict())
    found = model(VisionFeatures(tuple(inputs)))
    assert [tuple(level.shape) for level in found] == [(2, 3, OUT), (2, 8, OUT), (2, 32, OUT)]
    for level, (window, count) in enumerate(zip(CONFIG.windows, CONFIG.queries, strict=True)):
        side = GRID // window
        per_window = count // side**2
        for image in range(2):
            for token in range(count):
                row, column = divmod(token // per_window, side)
                places = [(row * window + r) * GRID + column * window + c for r in range(window) for c in range(window)]
                patches = [[depth[image, place] for place in places] for depth in inputs]
                expected = slow_token(state, f"levels.{level}.", state[f"levels.{level}.queries"][token], patches)
                torch.testing.assert_close(found[level][image, token], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch", [0, 7, 27, 63])
def test_a_patch_reaches_exactly_the_tokens_of_its_windows(patch):
    model, inputs = resampler(), features()
    before = model(VisionFeatures(tuple(inputs)))
    inputs[1][:, patch] += torch.randn(WIDTH)  # a constant would vanish in the LayerNorm
    row, column = divmod(patch, GRID)
    for level, (window, count) in enumerate(zip(CONFIG.windows, CONFIG.queries, strict=True)):
        side = GRID // window
        home = (row // window) * side + column // window
        per_window = count // side**2
        changed = (model(VisionFeatures(tuple(inputs)))[level] != before[level]).any(-1).any(0)
        expected = torch.zeros(count, dtype=torch.bool)
        expected[home * per_window : (home + 1) * per_window] = True
        assert changed.equal(expected)


def test_windows_are_cut_in_raster_order():
    image = torch.arange(16.0)[None, :, None]
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert split_windows(image, 4, 2).squeeze(-1).tolist() == expected


@torch.no_grad()
def test_depths_are_read_in_order():
    model, inputs = resampler(), features()
    forwards, backwards = model(VisionFeatures(tuple(inputs))), model(VisionFeatures(tuple(inputs[::-1])))
    assert (forwards[0] - backwards[0]).abs().max() > 1e-2
    # a block that adds nothing leaves the other depth's result
    for level in model.levels:
        for name in ("attention.out", "mlp.3"):
            module = level.blocks[0].get_submodule(name)
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    alone = resampler(depths=1)
    state = {
        name.replace("blocks.1.", "blocks.0."): t for name, t in model.state_dict().items() if "blocks.0." not in name
    }
    alone.load_state_dict(state)
    for two, one in zip(model(VisionFeatures(tuple(inputs))), alone(VisionFeatures(tuple(inputs[1:]))), strict=True):
        torch.testing.assert_close(two, one)


def test_initial_values_and_biases():
    torch.manual_seed(0)
    model = MultiScaleResampler(ResamplerConfig(windows=(8, 2), queries=(64, 64), head_dim=16), GRID, 64, 1, 96)
    parameters = dict(model.named_parameters())
    norms = [name for name in parameters if "norm" in name or ".mlp.0." in name]
    assert len(norms) == 2 * (3 * 2) + 2
    for name, value in parameters.items():
        if name in norms:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert 0.017 < value.std() < 0.021, name
            assert abs(value.mean()) < 0.003, name
    assert not any(name.endswith((".query.bias", ".key_value.bias")) for name in parameters)
    assert "levels.0.blocks.0.attention.out.bias" in parameters


def test_every_parameter_and_every_feature_gets_a_gradient():
    model, inputs = resampler(), [depth.requires_grad_() for depth in features()]
    torch.cat(model(VisionFeatures(tuple(inputs))), dim=1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all((depth.grad.abs().amax(-1) > 0).all() for depth in inputs)


def test_shapes_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"connector.windows\[1\]: 3 does not divide the 8 x 8"):
        MultiScaleResampler(ResamplerConfig(windows=(8, 3), queries=(1, 4)), GRID, WIDTH, 2, OUT)
    with pytest.raises(ValueError, match="5 does not divide the vision width 12"):
        MultiScaleResampler(ResamplerConfig(windows=(8,), queries=(1,), head_dim=5), GRID, WIDTH, 2, OUT)
    with pytest.raises(ValueError, match="49 patches, expected 8 x 8"):
        resampler()(VisionFeatures((torch.randn(1, 49, WIDTH),) * 2))
    with pytest.raises(ValueError, match="zip"):
        resampler()(VisionFeatures(tuple(features(depths=1))))


def test_the_papers_token_counts():
    with torch.device("meta"):
        model = MultiScaleResampler(ResamplerConfig(), 32, 64, 2, 8)
        levels = model(VisionFeatures((torch.empty(1, 1024, 64),) * 2))
    assert [level.shape[1] for level in levels] == [16, 256, 1024]


def test_gelu_is_the_exact_one():
    layer = resampler().levels[0].blocks[0].mlp[2]
    torch.testing.assert_close(layer(torch.tensor([1.0])), F.gelu(torch.tensor([1.0]), approximate="none"))
