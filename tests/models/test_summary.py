"""The summary token against Eq. 6 of Skip-Vision with the LayerNorm of the released code."""

from __future__ import annotations

import torch
from torch import nn

from skipvision_train.models.summary import AdaptiveSummary


def module(width: int = 6) -> AdaptiveSummary:
    torch.manual_seed(0)
    summary = AdaptiveSummary(width)
    for parameter in summary.parameters():
        nn.init.normal_(parameter)
    return summary


@torch.no_grad()
def test_equals_the_formula():
    summary, tokens = module(), torch.randn(2, 5, 6) * 3 + 1
    weight, gain = summary.score.weight[0], summary.norm.weight
    found = summary(tokens)
    assert found.shape == (2, 1, 6)
    for row in range(2):
        scores = []
        for x in tokens[row]:
            normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            scores.append(float((weight * gain * normed).sum().exp()))
        expected = sum(s / sum(scores) * x for s, x in zip(scores, tokens[row], strict=True))
        torch.testing.assert_close(found[row, 0], expected)


def test_equals_a_layer_norm_and_linear_with_any_biases():
    """The module has no biases because the softmax cancels them."""
    summary, tokens = module(), torch.randn(3, 7, 6)
    norm, score = nn.LayerNorm(6), nn.Linear(6, 1)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight.copy_(summary.norm.weight)
        score.weight.copy_(summary.score.weight)
    expected = score(norm(tokens)).softmax(dim=1).transpose(1, 2) @ tokens
    torch.testing.assert_close(summary(tokens), expected)


def test_identical_tokens_and_permutations():
    summary, tokens = module(), torch.randn(1, 5, 6)
    torch.testing.assert_close(summary(tokens[:, :1].expand(-1, 4, -1)), tokens[:, :1])
    torch.testing.assert_close(summary(tokens.flip(1)), summary(tokens))


def test_masked_tokens_count_for_nothing():
    summary, tokens = module(), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    noisy = tokens.masked_fill(~mask[..., None], float("nan"))
    found = summary(noisy, mask)
    torch.testing.assert_close(found[:1], summary(tokens[:1, mask[0]]))
    torch.testing.assert_close(found[1:], summary(tokens[1:]))


def test_every_parameter_and_token_gets_a_gradient():
    summary, tokens = AdaptiveSummary(6), torch.randn(2, 5, 6, requires_grad=True)
    summary(tokens).square().sum().backward()
    for name, parameter in summary.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (tokens.grad.abs().amax(-1) > 0).all()


def test_the_weights_are_computed_in_fp32_and_the_dtype_is_kept():
    summary, tokens = module().bfloat16(), torch.randn(1, 300, 6).bfloat16()
    found = summary(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), module()(tokens.float()), rtol=0.05, atol=0.02)
