"""The order of an image's tokens, by tagging them, against ``SkipVisionConfig.image_token_kinds()``."""

from __future__ import annotations

import pytest
import torch

from skipvision_train.models.configuration import ReducerConfig
from skipvision_train.models.merging import merge_tokens
from skipvision_train.models.reducer import Reducer
from skipvision_train.plans.rules import TokenKind

WIDTH = 5
VARIANTS = [
    ReducerConfig(skip_finest=skip, local_keep=keep, summary=summary, former_over=over, last_local_ffn=last)
    for skip, keep, summary, last in [
        (False, None, "none", False),
        (True, 6, "both", True),
        (True, 16, "both", True),
        (True, None, "both", False),
        (True, 6, "former", False),
        (True, 6, "latter", True),
        (True, 1, "none", True),
        (True, None, "none", False),
    ]
    for over in ("middle", "retained")
]


def levels(config) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, count, WIDTH) for count in config.connector_config.queries]


@pytest.mark.parametrize("reducer_config", VARIANTS, ids=str)
def test_tokens_come_in_the_order_of_the_kinds(reducer_config, config_factory):
    config = config_factory(reducer=reducer_config)
    reducer, (coarse, middle, local) = Reducer(reducer_config, WIDTH), levels(config)
    kinds = config.image_token_kinds()
    found = reducer([coarse, middle, local])
    assert found.shape == (2, len(kinds), WIDTH)
    if not reducer_config.skip_finest:
        torch.testing.assert_close(found, torch.cat([coarse, middle, local], 1), rtol=0, atol=0)
        return
    keep = reducer_config.local_keep
    merged = local if keep is None else merge_tokens(local, keep)
    retained = torch.cat([coarse, middle], 1)
    over = middle if reducer_config.former_over == "middle" else retained
    tokens = list(retained.unbind(1))
    if reducer_config.has_former:
        tokens.append(reducer.summary(over)[:, 0])
    tokens += merged.unbind(1)
    if reducer_config.has_latter:
        tokens.append(reducer.summary(merged)[:, 0])
    torch.testing.assert_close(found, torch.stack(tokens, 1), rtol=0, atol=0)
    # What the kinds call a summary is one, and the positions around it hold what they should.
    summaries = [i for i, kind in enumerate(kinds) if kind is TokenKind.SUMMARY]
    assert len(summaries) == reducer_config.has_former + reducer_config.has_latter
    plain = torch.cat([retained, merged], 1)
    others = [i for i in range(len(kinds)) if i not in summaries]
    torch.testing.assert_close(found[:, others], plain, rtol=0, atol=0)


def test_the_last_local_token_is_the_most_distinctive():
    """Fifteen tokens around one direction and one against it, which must come right before the latter summary."""
    local = torch.tensor([1.0, 0, 0, 0, 0]) + 0.1 * torch.randn(1, 16, WIDTH)
    local[0, 4] *= -1
    reducer = Reducer(ReducerConfig(local_keep=6), WIDTH)
    found = reducer([torch.randn(1, 2, WIDTH), torch.randn(1, 4, WIDTH), local])
    torch.testing.assert_close(found[0, -2], local[0, 4], rtol=0, atol=0)


def test_one_module_makes_both_summaries_and_none_is_made_in_vain():
    both = Reducer(ReducerConfig(summary="both"), WIDTH)
    assert [name for name, _ in both.named_parameters()] == ["summary.norm.weight", "summary.score.weight"]
    assert list(Reducer(ReducerConfig(summary="none"), WIDTH).parameters()) == []
    assert list(Reducer(ReducerConfig.off(), WIDTH).parameters()) == []


def test_gradients_reach_every_token_and_parameter(config_factory):
    config = config_factory()
    reducer, inputs = Reducer(config.reducer_config, WIDTH), [level.requires_grad_() for level in levels(config)]
    reducer(inputs).square().sum().backward()
    assert all((level.grad.abs().amax(-1) > 0).all() for level in inputs)
    assert all(parameter.grad.abs().max() > 0 for parameter in reducer.parameters())


def test_a_single_level_cannot_skip():
    with pytest.raises(ValueError, match="found 1, but"):
        Reducer(ReducerConfig(), WIDTH)([torch.randn(1, 4, WIDTH)])
