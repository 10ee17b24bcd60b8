"""The order of an image's tokens, by tagging them, against ``SkipVisionConfig.image_token_kinds()``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipvision_train.errors import ConfigError
from skipvision_train.models.configuration import ConnectorConfig, ReducerConfig
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
        assert set(kinds) == {TokenKind.RETAINED}
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


@pytest.mark.parametrize(
    ("windows", "queries", "last", "expected"),
    [
        ((8, 2), (2, 16), True, "rr sss r"),
        ((8, 2), (2, 16), False, "rr ssss"),
        ((8, 4, 2), (2, 4, 16), True, "rr mmmm sss r"),
        ((8, 4, 2, 1), (1, 4, 16, 64), False, "r mmmmmmmmmmmmmmmmmmmm ssss"),
    ],
)
def test_levels_between_the_coarsest_and_the_finest_are_middle(config_factory, windows, queries, last, expected):
    letters = {"r": TokenKind.RETAINED, "m": TokenKind.MIDDLE, "s": TokenKind.SKIPPED}
    config = config_factory(
        connector=ConnectorConfig(windows, queries, head_dim=16),
        reducer=ReducerConfig(local_keep=4, summary="none", last_local_ffn=last),
    )
    assert config.image_token_kinds() == tuple(letters[letter] for letter in expected.replace(" ", ""))


@pytest.mark.parametrize(
    "arrangement",
    [ReducerConfig(local_keep=6), ReducerConfig(local_keep=None, summary="former"), ReducerConfig.off()],
    ids=str,
)
def test_registers_stand_behind_every_image(config_factory, arrangement):
    with_them = replace(arrangement, registers=3)
    before = config_factory(reducer=arrangement).image_token_kinds()
    assert config_factory(reducer=with_them).image_token_kinds() == (*before, *[TokenKind.SUMMARY] * 3)
    reducer, inputs = Reducer(with_them, WIDTH), levels(config_factory())
    found = reducer(inputs)
    assert found.shape == (2, len(before) + 3, WIDTH)
    torch.testing.assert_close(found[:, -3:], reducer.registers.expand(2, 3, WIDTH), rtol=0, atol=0)
    plain = Reducer(arrangement, WIDTH)
    plain.load_state_dict({k: v for k, v in reducer.state_dict().items() if k != "registers"})
    torch.testing.assert_close(found[:, :-3], plain(inputs), rtol=0, atol=0)
    found[:, -3:].sum().backward()
    torch.testing.assert_close(reducer.registers.grad, torch.full((3, WIDTH), 2.0))


def test_registers_start_small_and_different():
    torch.manual_seed(0)
    registers = Reducer(ReducerConfig(registers=64), 256).registers.detach()
    assert 0.019 < registers.std() < 0.021
    assert registers.mean().abs() < 1e-3
    assert torch.pdist(registers).min() > 0.3  # 0.02 times the root of 2 * 256 is 0.45
    assert Reducer(ReducerConfig(), WIDTH).registers is None
    half = Reducer(replace(ReducerConfig.off(), registers=2), WIDTH)([torch.zeros(1, 4, WIDTH, dtype=torch.bfloat16)])
    assert half.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"^reducer\.registers: -1 is out of range; use 0 or more$"):
        ReducerConfig(registers=-1)


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
