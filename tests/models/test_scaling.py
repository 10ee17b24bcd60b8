"""Compound scaling, weight by weight, on the paper's token counts with tiny widths."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.resampler import MultiScaleResampler
from skipvision_train.models.scaling import scale_resampler, source_levels, spread_queries

WIDTH, OUT = 8, 6
SMALL = ResamplerConfig(windows=(16, 4), queries=(16, 64), head_dim=4)
LARGE = ResamplerConfig(windows=(32, 4, 2), queries=(16, 256, 1024), head_dim=4)


def pretrained(config: ResamplerConfig = SMALL, grid: int = 16) -> MultiScaleResampler:
    torch.manual_seed(0)
    model = MultiScaleResampler(config, grid, WIDTH, 2, OUT)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def scaled_model(old: MultiScaleResampler) -> MultiScaleResampler:
    model = MultiScaleResampler(LARGE, 32, WIDTH, 2, OUT)
    model.load_state_dict(scale_resampler(old.state_dict(), SMALL, 16, LARGE, 32), strict=True)
    return model


def test_80_to_1296_tokens_weight_by_weight():
    state = pretrained().state_dict()
    scaled = scale_resampler(state, SMALL, 16, LARGE, 32)
    assert set(scaled) == set(MultiScaleResampler(LARGE, 32, WIDTH, 2, OUT).state_dict())
    for name, tensor in scaled.items():
        if name.startswith("levels.") and not name.endswith(".queries"):
            level, rest = name.removeprefix("levels.").split(".", 1)
            source = f"levels.{min(int(level), 1)}.{rest}"
            assert tensor.equal(state[source]), name
        elif not name.startswith("levels."):
            assert tensor.equal(state[name]), name
    assert scaled["levels.0.queries"].equal(state["levels.0.queries"])
    old = state["levels.1.queries"]
    for level, side in ((1, 8), (2, 16)):
        queries = scaled[f"levels.{level}.queries"]
        assert queries.shape == (side * side * 4, WIDTH)
        factor = side // 4
        for row in range(side):
            for column in range(side):
                for query in range(4):
                    new_index = (row * side + column) * 4 + query
                    old_index = ((row // factor) * 4 + column // factor) * 4 + query
                    assert queries[new_index].equal(old[old_index])


@torch.no_grad()
def test_a_scaled_level_computes_what_the_old_one_does_on_a_corresponding_window():
    old = pretrained()
    new = scaled_model(old)
    # Paste the patches of an old 4 x 4 window into a new 4 x 4 window that lies at the same place of the image, and
    # enlarge a 2 x 2 window's patches to 4 x 4 (each key twice along both axes leaves the attention's average alone).
    small = [torch.randn(1, 16, 16, WIDTH) for _ in range(2)]
    for row, column in ((0, 0), (2, 5), (7, 3)):
        large = [torch.randn(1, 32, 32, WIDTH) for _ in range(2)]
        place = slice(row * 4, row * 4 + 4), slice(column * 4, column * 4 + 4)
        home = slice(row // 2 * 4, row // 2 * 4 + 4), slice(column // 2 * 4, column // 2 * 4 + 4)
        for s, b in zip(small, large, strict=True):
            b[(slice(None), *place)] = s[(slice(None), *home)]
        tokens = new(VisionFeatures(tuple(b.flatten(1, 2) for b in large)))[1][0].view(8, 8, 4, OUT)[row, column]
        expected = old(VisionFeatures(tuple(s.flatten(1, 2) for s in small)))[1][0].view(4, 4, 4, OUT)[
            row // 2, column // 2
        ]
        torch.testing.assert_close(tokens, expected)
    large = [torch.randn(1, 32, 32, WIDTH) for _ in range(2)]
    row, column = 9, 14
    for s, b in zip(small, large, strict=True):
        window = b[:, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
        doubled = window.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        s[:, row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4] = doubled
    tokens = new(VisionFeatures(tuple(b.flatten(1, 2) for b in large)))[2][0].view(16, 16, 4, OUT)[row, column]
    expected = old(VisionFeatures(tuple(s.flatten(1, 2) for s in small)))[1][0].view(4, 4, 4, OUT)[
        row // 4, column // 4
    ]
    torch.testing.assert_close(tokens, expected)


def test_same_shape_is_the_identity():
    state = pretrained().state_dict()
    scaled = scale_resampler(state, SMALL, 16, SMALL, 16)
    assert set(scaled) == set(state)
    assert all(scaled[name].equal(state[name]) for name in state)


def test_equal_levels_map_one_to_one():
    old = ResamplerConfig(windows=(8, 4, 2), queries=(3, 8, 16), head_dim=4)
    new = ResamplerConfig(windows=(16, 4, 2), queries=(3, 32, 64), head_dim=4)
    state = pretrained(old, 8).state_dict()
    scaled = scale_resampler(state, old, 8, new, 16)
    for level in range(3):
        name = f"levels.{level}.blocks.1.mlp.1.weight"
        assert scaled[name].equal(state[name])
    assert scaled["levels.1.queries"].equal(spread_queries(state["levels.1.queries"], 2, 4, 2))
    MultiScaleResampler(new, 16, WIDTH, 2, OUT).load_state_dict(scaled)


# Windows and queries of the released configurations and others, with the pretrained level each level starts from. The
# levels of 80 tokens hold 16 queries per window of the whole image and 4 per window of a 4 x 4 grid.
GEOMETRIES = [
    # 336 px: 24 patches per side
    (24, (24, 6), (16, 64), [0, 1]),
    # 448 px
    (32, (32, 8), (16, 64), [0, 1]),
    (32, (32, 16, 4), (16, 64, 256), [0, 0, 1]),
    (32, (32, 8, 4), (16, 64, 256), [0, 1, 1]),
    (32, (32, 8, 2), (16, 64, 1024), [0, 1, 1]),
    (32, (32, 8, 2), (16, 256, 1024), [0, 0, 1]),
    (32, (32, 4, 2), (16, 256, 1024), [0, 1, 1]),
    (32, (32, 16, 4, 2), (16, 64, 256, 1024), [0, 0, 1, 1]),
    (32, (32, 8, 4, 2), (16, 64, 256, 1024), [0, 1, 1, 1]),
    (32, (32, 8, 2, 1), (16, 256, 1024, 4096), [0, 0, 1, 1]),
    # 336 px, windows that the 4 x 4 ones do not divide into: 6 x 6 and 12 x 12
    (24, (24, 4, 2), (16, 144, 576), [0, 1, 1]),
    # 672 px: a window of the pretrained grid becomes 3 x 3, 2 x 2 or 6 x 6
    (48, (48, 12), (16, 64), [0, 1]),
    (48, (48, 4, 2), (16, 576, 2304), [0, 1, 1]),
    (48, (48, 6, 3), (16, 256, 1024), [0, 1, 1]),
    (48, (48, 16, 4, 2), (16, 144, 576, 2304), [0, 0, 1, 1]),
    (48, (48, 24, 4, 2), (16, 64, 576, 2304), [0, 0, 1, 1]),
    (48, (48, 6, 4, 2), (16, 256, 576, 2304), [0, 1, 1, 1]),
    # ... and evenly nothing: 6 x 6, 3 x 3 or 2 x 2 windows from 4 x 4
    (48, (48, 8, 4), (16, 144, 576), [0, 1, 1]),
    (48, (48, 16, 8), (16, 36, 144), [0, 1, 1]),
    (48, (48, 24, 6, 3), (16, 16, 256, 1024), [0, 1, 1, 1]),
    # 896 px
    (64, (64, 8, 4), (16, 256, 1024), [0, 1, 1]),
    (64, (64, 16, 8, 4), (16, 64, 256, 1024), [0, 1, 1, 1]),
]


def window_over_the_middle(old_side, side, window):
    """Measured along the side of the image: the old window that begins at or before the middle of this one, last."""
    middle = (Fraction(window, side) + Fraction(window + 1, side)) / 2
    return max(k for k in range(old_side) if Fraction(k, old_side) <= middle)


@pytest.mark.parametrize(("grid", "windows", "queries", "sources"), GEOMETRIES)
def test_80_tokens_to_every_geometry_weight_by_weight(grid, windows, queries, sources):
    new = ResamplerConfig(windows=windows, queries=queries, head_dim=4)
    state = pretrained().state_dict()
    scaled = scale_resampler(state, SMALL, 16, new, grid)
    MultiScaleResampler(new, grid, WIDTH, 2, OUT).load_state_dict(scaled, strict=True)
    for name in ("norm.weight", "norm.bias", "projection.weight", "projection.bias"):
        assert scaled[name].equal(state[name])
    for level, source in enumerate(sources):
        expected = {
            name.removeprefix(f"levels.{source}."): t for name, t in state.items() if f"levels.{source}." in name
        }
        found = {name.removeprefix(f"levels.{level}."): t for name, t in scaled.items() if f"levels.{level}." in name}
        assert set(found) == set(expected)
        assert all(found[name].equal(expected[name]) for name in found if name != "queries")
        side, old_side = grid // windows[level], 16 // SMALL.windows[source]
        each = SMALL.queries[source] // old_side**2
        over = [window_over_the_middle(old_side, side, i) for i in range(side)]
        rows = [
            (over[row] * old_side + over[column]) * each + query
            for row in range(side)
            for column in range(side)
            for query in range(each)
        ]
        assert found["queries"].equal(expected["queries"][rows])


@pytest.mark.parametrize(
    ("old", "sources"),
    [
        (ResamplerConfig(windows=(8, 4, 2), queries=(4, 16, 64), head_dim=4), [0, 1, 2]),  # each from its own
        (ResamplerConfig(windows=(8, 4), queries=(4, 16), head_dim=4), [0, 1, 1]),  # the coarsest from the coarsest
    ],
)
def test_levels_with_equal_windows_keep_their_order(old, sources):
    new = ResamplerConfig(windows=(8, 4, 2), queries=(16, 64, 256), head_dim=4)
    state = pretrained(old, 8).state_dict()
    scaled = scale_resampler(state, old, 8, new, 16)
    for level, source in enumerate(sources):
        name = "blocks.0.attention.out.weight"
        assert scaled[f"levels.{level}.{name}"].equal(state[f"levels.{source}.{name}"])


def test_a_third_stage_scales_the_second():
    new = ResamplerConfig(windows=(64, 8, 4, 2), queries=(16, 256, 1024, 4096), head_dim=4)
    state = pretrained(LARGE, 32).state_dict()
    scaled = scale_resampler(state, LARGE, 32, new, 64)
    # 8 x 8 and 16 x 16 windows of LARGE: only the first divide into 8 x 8, the second also into 16 x 16 and 32 x 32.
    for level, source in enumerate((0, 1, 2, 2)):
        name = "blocks.1.mlp.1.weight"
        assert scaled[f"levels.{level}.{name}"].equal(state[f"levels.{source}.{name}"])
    assert scaled["levels.2.queries"].equal(state["levels.2.queries"])


sizes = st.integers(1, 9)


@given(sizes, sizes, st.integers(1, 4))
def test_where_windows_divide_evenly_queries_are_repeated(old_side, factor, each):
    queries = torch.randn(old_side**2 * each, 3)
    found = spread_queries(queries, old_side, old_side * factor, each)
    windows = queries.view(old_side, old_side, each, 3)
    assert found.equal(windows.repeat_interleave(factor, 0).repeat_interleave(factor, 1).reshape(-1, 3))


@given(sizes, st.integers(1, 16), st.integers(1, 4))
def test_a_window_starts_from_the_one_that_covers_most_of_it(old_side, new_side, each):
    numbers = torch.arange(old_side**2 * each)[:, None].float()
    found = spread_queries(numbers, old_side, new_side, each)[:, 0].long().view(new_side, new_side, each)

    def covered(window, old):
        """Of the side of a new window the part that lies in an old one."""
        ends = min(Fraction(window + 1, new_side), Fraction(old + 1, old_side))
        return max(Fraction(0), ends - max(Fraction(window, new_side), Fraction(old, old_side)))

    for row in range(new_side):
        for column in range(new_side):
            places = {int(number) // each for number in found[row, column]}
            assert [int(number) % each for number in found[row, column]] == list(range(each))
            (place,) = places
            for window, old in ((row, place // old_side), (column, place % old_side)):
                assert covered(window, old) == max(covered(window, other) for other in range(old_side))


@pytest.mark.parametrize(
    ("each", "taken"), [(1, [2]), (2, [1, 3]), (4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (6, None), (64, None)]
)
def test_another_number_of_queries_per_window_is_taken_evenly_in_order(each, taken, caplog):
    new = ResamplerConfig(windows=(32, 4, 2), queries=(16, 64 * each, 256 * each), head_dim=4)
    state = pretrained().state_dict()
    scaled = scale_resampler(state, SMALL, 16, new, 32)
    MultiScaleResampler(new, 32, WIDTH, 2, OUT).load_state_dict(scaled, strict=True)
    first = scaled["levels.1.queries"][:each]
    own = state["levels.1.queries"][:4]
    used = [next(k for k in range(4) if row.equal(own[k])) for row in first]
    assert used == sorted(used)
    assert taken is None or used == taken
    counts = [used.count(k) for k in range(4)]
    assert max(counts) - min(counts) <= 1
    # The second and third window lie in the first and second old one.
    assert scaled["levels.1.queries"][2 * each : 3 * each].equal(state["levels.1.queries"][4:8][used])
    messages = [record.getMessage() for record in caplog.records]
    if each == 4:
        assert not messages
    else:
        assert messages == [
            f"connector.queries[{level}]: {each} queries per window, which no level of the weights has; they start "
            "from the 4 of level 1"
            for level in (1, 2)
        ]


# Windows per side and queries per window, of the weights and of the model, and the level that each level starts from.
LEVELS = [
    # as many levels with as many queries: each from its own, even where another one would divide evenly
    (((1, 8, 16), (16, 4, 4)), ((1, 16, 24), (16, 4, 4)), [0, 1, 2]),
    (((1, 2, 4), (4, 4, 4)), ((1, 3, 6), (4, 4, 4)), [0, 1, 2]),
    # the finest that it divides evenly; level 0 from level 0
    (((1, 8, 16), (16, 4, 4)), ((1, 8, 24, 48), (16, 4, 4, 4)), [0, 1, 1, 2]),
    (((1, 2), (4, 4)), ((2, 4, 8), (4, 4, 4)), [0, 1, 1]),
    # evenly none: the finest that has fewer windows, or the coarsest
    (((1, 4), (16, 4)), ((1, 2, 3, 6), (16, 4, 4, 4)), [0, 1, 1, 1]),
    (((1, 8, 16), (16, 4, 4)), ((1, 2, 12, 20), (16, 4, 4, 4)), [0, 1, 1, 2]),
    (((2, 4), (4, 4)), ((1, 3, 5), (4, 4, 4)), [0, 0, 1]),
    # no level with as many queries: any, by the same rule
    (((1, 4), (16, 4)), ((1, 4), (36, 1)), [0, 1]),
    (((1, 4), (16, 4)), ((1, 2, 8), (16, 8, 64)), [0, 0, 1]),
    (((1, 4), (16, 4)), ((1, 4, 8), (8, 16, 4)), [0, 0, 1]),
]


@pytest.mark.parametrize(("old", "new", "sources"), LEVELS)
def test_which_level_a_level_starts_from(old, new, sources):
    assert source_levels(*(list(part) for part in (*old, *new))) == sources


def test_other_mismatches_are_named():
    state = pretrained().state_dict()
    with pytest.raises(ConfigError, match=r"connector.head_dim: 8, but the weights were trained with 4"):
        scale_resampler(state, SMALL, 16, ResamplerConfig(windows=(16, 4), queries=(16, 64), head_dim=8), 16)
    with pytest.raises(ConfigError, match=r"connector.windows\[0\]: 32 does not divide"):
        scale_resampler(state, SMALL, 16, LARGE, 16)
    state["levels.1.queries"] = state["levels.1.queries"][:32]
    with pytest.raises(CheckpointError, match=r"levels\.1\.queries: found 32 queries, connector.queries has 64"):
        scale_resampler(state, SMALL, 16, LARGE, 32)
