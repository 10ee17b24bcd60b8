"""The order of an image's tokens against ``SkipVisionConfig.image_token_kinds()``, and what each of them is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import MlpConfig, MqtConfig, ResamplerConfig
from skipvision_train.models.merging import merge_tokens
from skipvision_train.models.reducer import Reducer
from skipvision_train.models.settings import ReducerConfig, TilingConfig, VisionConfig
from skipvision_train.plans.rules import TokenKind

WIDTH = 5
LEVELS = (2, 4, 16)
PATCHES = 64
SUMMARIES = ("none", "former", "latter", "both")
R, M, S, Y = TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED, TokenKind.SUMMARY


def connector_output(reducer: ReducerConfig, tiles: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Levels of so many tiles as the connector of this split makes them, and saliencies of the patches."""
    counts = LEVELS if reducer.split in ("finest", "none") else (PATCHES,)
    return [torch.randn(tiles, n, WIDTH) for n in counts], torch.rand(tiles, PATCHES)


def make_config(factory, reducer: ReducerConfig):
    """A model's configuration in which this reducer makes sense."""
    if reducer.split in ("finest", "none"):
        return factory(reducer=reducer)
    vision = VisionConfig(image_size=32, patch_size=4, width=32, layers=3, heads=2, depths=(2,))
    tiling = TilingConfig("aspect", max_tiles=4) if reducer.split == "tiles" else TilingConfig()
    return factory(vision=vision, connector=MlpConfig(), reducer=reducer, tiling=tiling)


def summary_by_hand(scorer, tokens: torch.Tensor) -> torch.Tensor:
    """softmax(w . LN(x)) weighted sum of (n, C), token by token."""
    scores = []
    for token in tokens:
        centred = token - token.mean()
        normed = centred / (centred.square().mean() + 1e-5).sqrt() * scorer.norm.weight
        scores.append((normed * scorer.score.weight[0]).sum())
    weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    return (weights[:, None] * tokens).sum(0)


def by_hand(reducer: Reducer, levels: list[torch.Tensor], saliency: torch.Tensor) -> torch.Tensor:
    """One image, its tiles along the first dimension: (n, C)."""
    config = reducer.config
    if config.split == "none":
        return torch.cat([tile for group in zip(*levels, strict=True) for tile in group])
    middle = None
    if config.split == "finest":
        retained, local, middle = torch.cat([levels[0][0], levels[1][0]]), levels[2][0], levels[1][0]
    elif config.split == "tiles":
        retained, local = levels[0][0], torch.cat(list(levels[0][1:]))
    else:
        best = sorted(range(PATCHES), key=lambda i: (-float(saliency[0, i]), i))[: config.retain]
        retained = torch.stack([levels[0][0, i] for i in sorted(best)])
        local = torch.stack([levels[0][0, i] for i in range(PATCHES) if i not in best])
    if config.local_keep is not None and len(local) > config.local_keep:
        local = merge_tokens(local[None], config.local_keep, order=config.merge_order)[0]
    over = {"retained": retained, "middle": middle, "skipped": local}
    latter = reducer.latter_summary or reducer.summary
    tokens = list(retained)
    tokens += [summary_by_hand(reducer.summary, over[config.former_over])] if config.has_former else []
    tokens += list(local)
    tokens += [summary_by_hand(latter, over[config.latter_over])] if config.has_latter else []
    return torch.stack(tokens)


@st.composite
def reducers(draw) -> ReducerConfig:
    split = draw(st.sampled_from(["finest", "saliency", "tiles"]))
    middle = ["middle"] if split == "finest" else []
    return ReducerConfig(
        split=split,
        retain=draw(st.integers(1, PATCHES - 12)) if split == "saliency" else None,
        local_keep=draw(st.one_of(st.none(), st.integers(1, 12))),
        merge_order=draw(st.sampled_from(["similarity", "raster"])),
        summary=draw(st.sampled_from(SUMMARIES)),
        former_over=draw(st.sampled_from(["retained", "skipped", *middle])),
        latter_over=draw(st.sampled_from(["retained", "skipped", *middle])),
        summary_layers=draw(st.sampled_from(["shared", "separate"])),
        last_local_ffn=draw(st.booleans()),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=reducers(), tiles=st.lists(st.integers(2, 5), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_every_image_of_a_batch_is_what_it_is_by_hand(config_factory, config, tiles, seed):
    torch.manual_seed(seed)
    tiles = tiles if config.split == "tiles" else [1] * len(tiles)
    model = make_config(config_factory, config)
    reducer = Reducer(config, WIDTH)
    for scorer in filter(None, (reducer.summary, reducer.latter_summary)):
        torch.nn.init.normal_(scorer.score.weight)
    levels, saliency = connector_output(config, sum(tiles))
    with torch.no_grad():
        found = reducer(levels, saliency, tiles).split()
        starts = [sum(tiles[:i]) for i in range(len(tiles))]
        for image, start, count in zip(found, starts, tiles, strict=True):
            own = slice(start, start + count)
            expected = by_hand(reducer, [level[own] for level in levels], saliency[own])
            torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
            kinds = model.image_token_kinds(count)
            assert len(kinds) == len(image)
            assert kinds.count(Y) == config.has_former + config.has_latter
            assert kinds.count(S) == config.merged(model.local_tokens(count)) - config.last_local_ffn


@pytest.mark.parametrize("tiles", [[1, 1], [3, 2]])
def test_dense_tokens_stay_as_they_are(tiles):
    levels, _ = connector_output(ReducerConfig.off(), sum(tiles))
    found = Reducer(ReducerConfig.off(), WIDTH)(levels, tiles=tiles).split()
    reducer, start = Reducer(ReducerConfig.off(), WIDTH), 0
    for image, count in zip(found, tiles, strict=True):
        own = [level[start : start + count] for level in levels]
        torch.testing.assert_close(image, by_hand(reducer, own, torch.zeros(0)), rtol=0, atol=0)
        start += count


@pytest.mark.parametrize(
    ("windows", "queries", "last", "expected"),
    [
        ((8, 2), (2, 16), True, [R, R, S, S, S, R]),
        ((8, 2), (2, 16), False, [R, R, S, S, S, S]),
        ((8, 4, 2), (2, 4, 16), True, [R, R, M, M, M, M, S, S, S, R]),
        ((8, 4, 2, 1), (1, 4, 16, 64), False, [R, *[M] * 20, S, S, S, S]),
    ],
)
def test_levels_between_the_coarsest_and_the_finest_are_middle(config_factory, windows, queries, last, expected):
    config = config_factory(
        connector=ResamplerConfig(windows, queries, head_dim=16),
        reducer=ReducerConfig(local_keep=4, summary="none", last_local_ffn=last),
    )
    assert config.image_token_kinds() == tuple(expected)


def test_kinds_of_the_other_splits(config_factory):
    off = {"local_keep": 3, "former_over": "retained", "last_local_ffn": False}
    saliency = make_config(config_factory, ReducerConfig(split="saliency", retain=2, **off))
    assert saliency.image_token_kinds() == (R, R, Y, S, S, S, Y)
    tiles = make_config(config_factory, ReducerConfig(split="tiles", **off | {"local_keep": 100}))
    assert tiles.image_token_kinds(2) == (*[R] * 64, Y, *[S] * 64, Y)
    assert tiles.image_token_kinds(3) == tiles.image_token_kinds(5) == (*[R] * 64, Y, *[S] * 100, Y)
    assert tiles.image_token_kinds() == tiles.image_token_kinds(5)
    with pytest.raises(ConfigError, match=r"^tiles: 6; an image has 2 or 3 or 4 or 5$"):
        tiles.image_token_kinds(6)


def test_kinds_of_an_elastic_number_of_queries(config_factory):
    vision = VisionConfig(image_size=32, patch_size=4, width=32, layers=3, heads=2, depths=(2,))
    off = ReducerConfig.off()
    config = config_factory(vision=vision, connector=MqtConfig(queries=16, keep=9, head_dim=16), reducer=off)
    assert config.image_token_kinds() == (R,) * 9
    assert config.image_token_kinds(queries=4) == (R,) * 4
    with pytest.raises(ConfigError, match=r"^queries: 17 of 16; use 1 to 16$"):
        config.image_token_kinds(queries=17)
    with pytest.raises(ConfigError, match=r"^queries: 4; connector\.type resampler has a fixed number of tokens$"):
        config_factory(reducer=off).image_token_kinds(queries=4)


@pytest.mark.parametrize(
    "arrangement",
    [ReducerConfig(local_keep=6), ReducerConfig(local_keep=None, summary="former"), ReducerConfig.off()],
    ids=str,
)
def test_registers_stand_behind_every_image(config_factory, arrangement):
    with_them = replace(arrangement, registers=3)
    before = config_factory(reducer=arrangement).image_token_kinds()
    assert config_factory(reducer=with_them).image_token_kinds() == (*before, Y, Y, Y)
    reducer, (inputs, _) = Reducer(with_them, WIDTH), connector_output(arrangement, 2)
    found = torch.stack(reducer(inputs).split())
    assert found.shape == (2, len(before) + 3, WIDTH)
    torch.testing.assert_close(found[:, -3:], reducer.registers.expand(2, 3, WIDTH), rtol=0, atol=0)
    plain = Reducer(arrangement, WIDTH)
    plain.load_state_dict({k: v for k, v in reducer.state_dict().items() if k != "registers"})
    torch.testing.assert_close(found[:, :-3], torch.stack(plain(inputs).split()), rtol=0, atol=0)
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
    assert half.tokens.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"^reducer\.registers: -1 is out of range; use 0 or more$"):
        ReducerConfig(registers=-1)


def test_the_last_local_token_is_the_most_distinctive():
    """Fifteen tokens around one direction and one against it, which must come right before the latter summary."""
    local = torch.tensor([1.0, 0, 0, 0, 0]) + 0.1 * torch.randn(1, 16, WIDTH)
    local[0, 4] *= -1
    levels = [torch.randn(1, 2, WIDTH), torch.randn(1, 4, WIDTH), local]
    found = Reducer(ReducerConfig(local_keep=6), WIDTH)(levels).tokens
    torch.testing.assert_close(found[-2], local[0, 4], rtol=0, atol=0)


def test_modules_are_shared_or_separate_and_none_is_made_in_vain():
    def names(**fields) -> list[str]:
        return [name for name, _ in Reducer(ReducerConfig(**fields), WIDTH).named_parameters()]

    shared = ["summary.norm.weight", "summary.score.weight"]
    assert names(summary="both") == shared
    assert names(summary="both", summary_layers="separate") == [*shared, *(f"latter_{name}" for name in shared)]
    assert names(summary="latter", summary_layers="separate") == shared
    assert names(summary="none") == []
    assert list(Reducer(ReducerConfig.off(), WIDTH).parameters()) == []


@pytest.mark.parametrize("tiles", [[2, 2, 2], [2, 5, 3]])
def test_modules_with_weights_run_once_however_images_are_cut(tiles):
    """Under ZeRO-3 every process must gather the same weights equally often."""
    config = ReducerConfig(split="tiles", local_keep=100, former_over="retained", last_local_ffn=False)
    reducer, calls = Reducer(config, WIDTH), []
    reducer.summary.register_forward_hook(lambda *_: calls.append(1))
    reducer(connector_output(config, sum(tiles))[0], tiles=tiles)
    assert len(calls) == 2  # former and latter


@pytest.mark.parametrize("count", [1, 3])
def test_one_tensor_comes_out_however_many_images_there_are(count):
    """Under ZeRO-3 every output tensor is another step of the order that all processes must share."""
    config = ReducerConfig(split="tiles", local_keep=100, former_over="retained", last_local_ffn=False)
    found = Reducer(config, WIDTH)(connector_output(config, 2 * count)[0], tiles=[2] * count)
    assert sum(isinstance(part, torch.Tensor) for part in found) == 1
    assert len(found.lengths) == count


@pytest.mark.parametrize("split", ["finest", "saliency", "tiles"])
def test_gradients_reach_every_token_and_parameter(split):
    config = ReducerConfig(
        split=split,
        retain=9 if split == "saliency" else None,
        local_keep=6,
        former_over="retained",
        summary_layers="separate",
    )
    reducer = Reducer(config, WIDTH)
    levels, saliency = connector_output(config, 3 if split == "tiles" else 1)
    levels = [level.requires_grad_() for level in levels]
    reducer(levels, saliency, [len(saliency)]).tokens.square().sum().backward()
    assert all((level.grad.abs().amax(-1) > 0).all() for level in levels)
    assert all(parameter.grad.abs().max() > 0 for parameter in reducer.parameters())


def test_what_does_not_fit_is_refused():
    levels, saliency = connector_output(ReducerConfig(), 3)
    with pytest.raises(ValueError, match="found 1, but"):
        Reducer(ReducerConfig(), WIDTH)([torch.randn(1, 4, WIDTH)])
    with pytest.raises(ValueError, match=r"tiles: 2 of 1 images, but the connector made 3"):
        Reducer(ReducerConfig(), WIDTH)(levels, tiles=[2])
    with pytest.raises(ValueError, match=r"an image of 3; split finest takes one tile per image"):
        Reducer(ReducerConfig(), WIDTH)(levels, tiles=[3])
    ranked = ReducerConfig(split="saliency", retain=3, former_over="retained")
    with pytest.raises(ValueError, match="saliency: split saliency ranks tokens by it"):
        Reducer(ranked, WIDTH)([torch.randn(1, PATCHES, WIDTH)])
    assert saliency.shape == (3, PATCHES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "half"}, r"^reducer\.split: 'half' is unknown; use none, finest, saliency, tiles$"),
        ({"split": "saliency"}, r"^reducer\.retain: None with reducer\.split saliency"),
        ({"retain": 4}, r"^reducer\.retain: 4 with reducer\.split finest"),
        ({"local_keep": 0}, r"^reducer\.local_keep: 0 is out of range"),
        ({"split": "none"}, r"^reducer\.split: none leaves no skipped tokens"),
        ({"merge_rounds": 0}, r"^reducer\.merge_rounds: 0 is out of range"),
        ({"former_over": "all"}, r"^reducer\.former_over: 'all' is unknown; use retained, middle, skipped$"),
    ],
)
def test_fields_that_contradict_each_other(fields, message):
    with pytest.raises(ConfigError, match=message):
        ReducerConfig(**fields)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reducer": ReducerConfig(local_keep=17)}, r"^reducer\.local_keep: 17 of 16 tokens; use 1 to 16$"),
        ({"tiling": TilingConfig("square")}, r"^tiling\.mode: square with reducer\.split finest"),
        (
            {"reducer": ReducerConfig(split="saliency", retain=3, local_keep=2, former_over="retained")},
            r"^reducer\.split: saliency ranks the patches, which this connector does not keep",
        ),
        (
            {"reducer": ReducerConfig(split="tiles", local_keep=2)},
            r"^reducer\.split: tiles needs tiling\.mode aspect or square",
        ),
        (
            {"connector": ResamplerConfig((8,), (2,), 16), "reducer": ReducerConfig(local_keep=2)},
            r"^reducer\.split: finest needs at least two levels",
        ),
        (
            {"tiling": TilingConfig("aspect"), "reducer": ReducerConfig(split="tiles", local_keep=2)},
            r"^reducer\.former_over: middle is a level of the resampler, which reducer\.split tiles",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_each_other(config_factory, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_factory(**overrides)
