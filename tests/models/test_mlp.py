"""LLaVA's projector against the sequence of layers it names, and mean pooling against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.mlp import MlpProjector, mean_cells


def features(*shape: int) -> VisionFeatures:
    return VisionFeatures(states=(torch.randn(*shape),))


def test_takes_the_names_of_llavas_file_and_computes_what_it_means():
    torch.manual_seed(0)
    shapes = {"0.weight": (12, 8), "0.bias": (12,), "2.weight": (12, 12), "2.bias": (12,)}
    file = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    projector = MlpProjector(MlpConfig(), 8, 12)
    projector.load_state_dict({name.removeprefix("model.mm_projector."): tensor for name, tensor in file.items()})
    given = features(2, 9, 8)
    (found,) = projector(given)
    w0, b0, w2, b2 = file.values()
    expected = F.gelu(given.states[0] @ w0.T + b0) @ w2.T + b2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "names"), [(1, ["0"]), (3, ["0", "2", "4"])])
def test_number_of_layers(layers, names):
    projector = MlpProjector(MlpConfig(layers=layers), 8, 12)
    assert list(projector.state_dict()) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert projector(features(1, 4, 8))[0].shape == (1, 4, 12)


def test_starts_as_torch_starts_linear_layers():
    torch.manual_seed(0)
    projector = MlpProjector(MlpConfig(), 64, 64)
    for tensor in projector.parameters():
        assert tensor.abs().max() <= 1 / 8
        assert tensor.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.2)


def test_the_last_depth_is_read():
    projector = MlpProjector(MlpConfig(), 8, 12)
    last = features(1, 4, 8)
    both = VisionFeatures(states=(torch.randn(1, 4, 8), *last.states))
    torch.testing.assert_close(projector(both)[0], projector(last)[0], rtol=0, atol=0)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_cells_are_averaged_in_raster_order(side):
    tokens = torch.randn(2, 36, 5)
    image = tokens.view(2, 6, 6, 5)
    expected = [
        image[:, y : y + side, x : x + side].reshape(2, -1, 5).mean(1)
        for y in range(0, 6, side)
        for x in range(0, 6, side)
    ]
    torch.testing.assert_close(mean_cells(tokens, side), torch.stack(expected, 1))


def test_pooling_averages_what_was_projected():
    pooled = MlpProjector(MlpConfig(pool=2), 8, 12)
    plain = MlpProjector(MlpConfig(), 8, 12)
    plain.load_state_dict(pooled.state_dict())
    given = features(2, 16, 8)
    (whole,), (found,) = plain(given), pooled(given)
    assert found.shape == (2, 4, 12)
    torch.testing.assert_close(found[:, 1], whole[:, [2, 3, 6, 7]].mean(1))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close(autocast):
    torch.manual_seed(0)
    projector, given = MlpProjector(MlpConfig(pool=2), 32, 12), features(2, 16, 32)
    (exact,) = projector(given)
    if not autocast:
        projector, given = projector.bfloat16(), VisionFeatures(states=(given.states[0].bfloat16(),))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (found,) = projector(given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=2e-2)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in projector.parameters())
