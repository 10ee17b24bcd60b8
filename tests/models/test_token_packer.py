"""TokenPacker against attention over all patches with an explicit mask, head by head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import TokenPackerConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.token_packer import TokenPacker, shrink

WIDTH, PACKER, HEADS, LLM = 10, 16, 4, 12


def make(grid: int, scale: int, depths: int = 3) -> TokenPacker:
    torch.manual_seed(0)
    module = TokenPacker(TokenPackerConfig(scale=scale, width=PACKER, heads=HEADS), grid, WIDTH, depths, LLM)
    for parameter in module.parameters():  # the usual start has zero biases and nearly uniform attention
        nn.init.normal_(parameter, std=0.4)
    return module


def tiles(batch: int, grid: int, depths: int = 3) -> VisionFeatures:
    return VisionFeatures(states=tuple(torch.randn(batch, grid * grid, WIDTH) for _ in range(depths)))


def coarse(state: torch.Tensor, grid: int, scale: int) -> torch.Tensor:
    """The middle of every cell: four patches, or one."""
    low, high = (scale - 1) // 2, scale // 2 + 1
    image = state.view(len(state), grid, grid, -1)
    return torch.stack(
        [
            image[:, y + low : y + high, x + low : x + high].flatten(1, 2).mean(1)
            for y in range(0, grid, scale)
            for x in range(0, grid, scale)
        ],
        dim=1,
    )


def masked_attention(module: TokenPacker, features: VisionFeatures, grid: int, scale: int) -> torch.Tensor:
    every = torch.cat(features.states, dim=-1)
    q = module.norm_query(module.query(coarse(features.states[-1], grid, scale)))
    k, v = module.norm_key(module.key(every)), module.norm_value(module.value(every))
    fused = module.attention
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip((q, k, v), fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True)
    )
    side, each, heads = grid // scale, PACKER // HEADS, []
    mask = torch.full((side * side, grid * grid), -torch.inf)
    for patch in range(grid * grid):
        mask[patch // grid // scale * side + patch % grid // scale, patch] = 0.0
    for h in range(HEADS):
        part = slice(h * each, (h + 1) * each)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / each**0.5 + mask
        heads.append(scores.softmax(-1) @ v[..., part])
    return module.projection(fused.out_proj(torch.cat(heads, -1)))


@pytest.mark.parametrize(("grid", "scale"), [(6, 2), (6, 3), (8, 4), (4, 1), (4, 4)])
def test_equals_masked_attention_over_all_patches(grid, scale):
    module, given = make(grid, scale), tiles(2, grid)
    (found,) = module(given)
    assert found.shape == (2, (grid // scale) ** 2, LLM)
    torch.testing.assert_close(found, masked_attention(module, given, grid, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_token_depends_on_its_own_cell_and_all_depths(scale):
    side = 3
    grid = side * scale
    module, given = make(grid, scale), tiles(1, grid)
    for state in given.states:
        state.requires_grad_()
    module(given)[0][0, 5].square().sum().backward()  # the cell in row 1, column 2
    for state in given.states:
        touched = (state.grad[0].abs().sum(-1) > 0).view(side, scale, side, scale)
        expected = torch.zeros_like(touched)
        expected[1, :, 2] = True
        assert torch.equal(touched, expected)


def test_the_query_is_not_added_to_the_token():
    """With all values alike a token says nothing about its query."""
    module, given = make(6, 2), tiles(1, 6)
    nn.init.zeros_(module.norm_value.weight)
    (found,) = module(given)
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


def test_shrinking_reads_the_middle_of_a_cell_and_keeps_the_dtype():
    state = torch.randn(2, 144, 3)
    for scale in (1, 2, 3, 4, 6):
        torch.testing.assert_close(shrink(state, 12, scale), coarse(state, 12, scale))
    assert shrink(state.bfloat16(), 12, 2).dtype == torch.bfloat16


def test_every_parameter_learns():
    module = make(6, 2).double()
    states = tuple(state.double() for state in tiles(2, 6).states)
    module(VisionFeatures(states))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        # The same amount added to all keys shifts all scores of a query alike: this bias has no influence.
        assert (parameter.grad.abs().max() > 1e-9) == (name != "norm_key.bias"), name


def test_starts_as_the_public_code_does():
    torch.manual_seed(0)
    module = TokenPacker(TokenPackerConfig(scale=2, width=128, heads=2), 4, 96, 2, 112)
    fused = nn.MultiheadAttention(128, 2).in_proj_weight.abs().max().item()
    assert module.query.bias is None
    for name, parameter in module.named_parameters():
        if name == "attention.in_proj_weight":
            assert parameter.abs().max().item() == pytest.approx(fused, rel=1e-3)
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif name.startswith("norm"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_is_close(autocast, training):
    module, given = make(6, 2).train(training), tiles(2, 6)
    (exact,) = module(given)
    if not autocast:
        module = module.bfloat16()
        given = VisionFeatures(states=tuple(state.bfloat16() for state in given.states))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(training):
        (found,) = module(given)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_cells_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(ConfigError, match=r"connector\.scale: 4 does not divide the 6 x 6 grid"):
        make(6, 4)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="25 patches, expected 6 x 6"):
        make(6, 2)(tiles(1, 5))
