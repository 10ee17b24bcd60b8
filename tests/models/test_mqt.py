"""MQT's resampler against torch's own attention module with the position embedding written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import MqtConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.mqt import MqtResampler, resize_positions, sincos_positions
from skipvision_train.models.settings import VisionConfig

WIDTH, GRID, LLM = 16, 6, 20


def make(queries: int = 16, keep: int = 16, grid: int = GRID) -> MqtResampler:
    torch.manual_seed(0)
    module = MqtResampler(MqtConfig(queries=queries, keep=keep, head_dim=4), grid, WIDTH, LLM)
    for parameter in module.parameters():  # the usual start has zero biases and nearly uniform attention
        nn.init.normal_(parameter, std=0.5)
    return module


def images(*batch: int, grid: int = GRID) -> VisionFeatures:
    return VisionFeatures(states=(torch.randn(*batch, grid * grid, WIDTH),))


def written_out(side: int, width: int) -> list[list[float]]:
    rows = []
    for y in range(side):
        for x in range(side):
            row = []
            for place in (x, y):  # the column first, as MAE's code has it
                angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return rows


def test_positions_equal_the_formula():
    torch.testing.assert_close(sincos_positions(5, 12, torch.device("cpu")), torch.tensor(written_out(5, 12)))


def test_resized_positions_keep_axes_apart_and_a_fitting_grid_is_unchanged():
    positions = sincos_positions(4, 12, torch.device("cpu"))
    torch.testing.assert_close(resize_positions(positions, 4), positions)
    large = resize_positions(positions, 7).view(7, 7, 12)
    torch.testing.assert_close(large[..., :6], large[:1, :, :6].expand(7, 7, 6))  # columns do not vary along rows
    torch.testing.assert_close(large[..., 6:], large[:, :1, 6:].expand(7, 7, 6))


@pytest.mark.parametrize("grid", [GRID, 3])
def test_equals_torchs_attention_module(grid):
    """The public code's structure, on ``MultiheadAttention`` with keys repeated for every image."""
    module = make(grid=grid)
    fused = nn.MultiheadAttention(WIDTH, WIDTH // 4, batch_first=True)
    parts = (module.query, module.key, module.value)
    fused.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": module.out.weight,
            "out_proj.bias": module.out.bias,
        }
    )
    given = images(3, grid=grid)
    place = torch.tensor(written_out(4, WIDTH))
    patches = F.interpolate(place.view(1, 4, 4, WIDTH).permute(0, 3, 1, 2), (grid, grid), mode="bicubic")
    patches = patches.permute(0, 2, 3, 1).reshape(grid * grid, WIDTH)

    def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    expected = fused(
        norm(module.queries + place, module.norm_query).expand(3, -1, -1),
        norm(patches, module.norm_key).expand(3, -1, -1),
        norm(given.states[0], module.norm_value),
    )[0]
    torch.testing.assert_close(module(given)[0], expected @ module.projection.weight.T, rtol=1e-5, atol=1e-5)


@settings(max_examples=16, derandomize=True)
@given(used=st.integers(1, 16))
def test_fewer_queries_give_the_first_of_all_tokens(used):
    module, given = make(), images(2)
    (every,), (some,) = module(given), module(given, used)
    assert some.shape == (2, used, LLM)
    torch.testing.assert_close(some, every[:, :used], rtol=1e-5, atol=1e-5)


def test_keep_is_the_default_number():
    assert make(keep=5)(images(1))[0].shape == (1, 5, LLM)


def test_what_is_attended_does_not_depend_on_the_image():
    """Changing one patch changes the tokens by the same amount, whatever the rest of the image shows."""
    module = make()
    one, other = torch.randn(1, GRID**2, WIDTH), torch.randn(1, GRID**2, WIDTH)
    other[:, 7] = one[:, 7]
    changed = torch.randn(WIDTH)
    differences = []
    for image in (one, other):
        after = image.clone()
        after[:, 7] = changed
        differences.append(module(VisionFeatures((after,)))[0] - module(VisionFeatures((image,)))[0])
    assert differences[0].abs().max() > 1e-2
    torch.testing.assert_close(*differences, rtol=1e-4, atol=1e-5)


def test_every_parameter_that_is_used_learns_and_unused_queries_do_not():
    module = make().double()
    module(VisionFeatures((images(2).states[0].double(),)), 4)[0].square().sum().backward()
    assert (module.queries.grad[:4].abs().sum(1) > 0).all()
    assert (module.queries.grad[4:] == 0).all()
    for name, parameter in module.named_parameters():
        # The same amount added to all keys shifts all scores of a query alike: these biases have no influence.
        assert (parameter.grad.abs().max() > 1e-9) == (name not in ("key.bias", "norm_key.bias")), name


def test_starts_as_the_public_code_does():
    torch.manual_seed(0)
    module = MqtResampler(MqtConfig(queries=64, keep=64, head_dim=64), 4, 256, 100)
    fused = nn.MultiheadAttention(256, 4).in_proj_weight
    for part in (module.query, module.key, module.value):
        assert part.weight.abs().max().item() == pytest.approx(fused.abs().max().item(), rel=1e-3)
        assert part.bias.abs().max() == 0
    assert module.out.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert module.queries.std().item() == pytest.approx(0.02, rel=0.03)
    assert module.projection.weight.std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close(autocast):
    module, given = make(), images(2)
    (exact,) = module(given)
    if not autocast:
        module, given = module.bfloat16(), VisionFeatures(states=(given.states[0].bfloat16(),))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (found,) = module(given)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("queries", [0, 17])
def test_queries_out_of_range_are_refused(queries):
    with pytest.raises(ValueError, match=f"queries: {queries} of 16; use 1 to 16"):
        make()(images(1), queries)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="25 patches, expected 6 x 6"):
        make()(images(1, grid=5))


def test_settings_that_cannot_be_built_are_refused():
    vision = VisionConfig(image_size=16, patch_size=4, width=6, layers=2, heads=1, depths=(2,))
    with pytest.raises(ConfigError, match=r"^connector\.queries: 12 is no square number"):
        MqtConfig(queries=12, keep=12, head_dim=4)
    with pytest.raises(ConfigError, match=r"^vision\.width: 6 is no multiple of 4"):
        MqtConfig(queries=9, keep=9, head_dim=6).levels(vision)
    with pytest.raises(ConfigError, match=r"^connector\.head_dim: 5 does not divide vision\.width 16"):
        MqtResampler(MqtConfig(queries=9, keep=9, head_dim=5), 4, 16, 8)
