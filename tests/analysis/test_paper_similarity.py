"""Similarity within a level against loops over all pairs; which tokens are a level, of our models and of others'."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlms import make_family
from watched import make_ours, our_samples, sample_of

from skipvision_train.analysis.similarity import (
    BINS,
    LevelSimilarity,
    level_tokens,
    mean_similarities,
    similarity_density,
    true_runs,
)
from skipvision_train.errors import DataError
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.settings import ReducerConfig, VisionConfig


def slow_similarity(tokens, i):
    def cosine(a, b):
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0

    others = [cosine(tokens[i], other) for k, other in enumerate(tokens) if k != i]
    return sum(others) / len(others)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_mean_similarity_is_that_of_all_pairs(images, count, width, seed):
    tokens = torch.randn(images, count, width, generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = 0.0
    found = mean_similarities(tokens)
    for image, row in zip(tokens.tolist(), found, strict=True):
        expected = [slow_similarity(image, i) for i in range(count)]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_equal_tokens_have_similarity_one():
    torch.testing.assert_close(mean_similarities(torch.ones(1, 4, 3, dtype=torch.bfloat16)), torch.ones(1, 4))


def test_levels_of_our_model_are_the_connectors(tiny_config):
    model, _ = make_ours(tiny_config)
    samples = our_samples(model)
    levels = similarity_density(model, samples)
    assert [(level.name, level.tokens) for level in levels] == [("window 8", 2), ("window 4", 4), ("window 2", 16)]
    with torch.no_grad():
        expected = [model.connector(model.vision_tower(sample.inputs["pixel_values"])) for sample in samples]
    for i, level in enumerate(levels):
        values = [slow_similarity(own, k) for sample in expected for own in sample[i].tolist() for k in range(len(own))]
        torch.testing.assert_close(level.values, torch.tensor(values), atol=1e-5, rtol=1e-4)
        first = level.values[: expected[0][i].shape[1]]
        assert level.means[0].item() == pytest.approx(first.mean().item(), rel=1e-5)
        assert level.estimate().mean.item() == pytest.approx(level.means.mean().item())
        assert sum(level.to_dict()["histogram"]) == len(values)


def test_a_single_token_has_no_others(config_factory):
    config = config_factory(
        vision=VisionConfig(image_size=8, patch_size=4, width=32, layers=3, heads=2, depths=(2,)),
        connector=MlpConfig(layers=1, pool=2),
        reducer=ReducerConfig.off(),
    )
    model, _ = make_ours(config)
    (level,) = similarity_density(model, our_samples(model))
    assert (level.name, level.tokens, len(level.values)) == ("visual tokens", 1, 0)
    assert level.to_dict()["mean"] is None
    assert level.to_dict()["standard_deviation"] is None


def test_histogram_has_equal_bins_from_minus_one_to_one():
    level = LevelSimilarity("x", 3, torch.tensor([-1.0, 0.011, 1.0]), torch.tensor([0.0]))
    counts = level.to_dict()["histogram"]
    assert len(counts) == BINS
    assert [i for i, count in enumerate(counts) if count] == [0, 50, 99]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_level_of_other_models_is_what_reaches_the_decoder(name):
    tiny = make_family(name)
    sample, features = sample_of(tiny.inputs(0)), []
    with torch.no_grad():
        inputs = {key: value for key, value in sample.inputs.items() if key in ("pixel_values", "image_grid_thw")}
        encoded = tiny.model.get_image_features(**inputs).pooler_output
        features = [image.flatten(0, -2) for image in encoded]
    ((label, groups),) = level_tokens(tiny.model, sample)
    assert label == "image features"
    assert [len(group) for group in groups] == [1, 1]  # two images with text between them
    for group, expected in zip(groups, features, strict=True):
        torch.testing.assert_close(group[0], expected, atol=1e-6, rtol=1e-6)
    (level,) = similarity_density(tiny.model, [sample])
    values = [slow_similarity(own.tolist(), k) for own in features for k in range(len(own))]
    torch.testing.assert_close(level.values, torch.tensor(values), atol=1e-5, rtol=1e-4)
    assert not tiny.decoder._forward_pre_hooks


def test_text_alone_is_refused(tiny_config):
    tiny = make_family("llava")
    with pytest.raises(DataError, match="record s: shows no image"):
        similarity_density(tiny.model, [sample_of(tiny.inputs(2))])
    model, _ = make_ours(tiny_config)
    with pytest.raises(DataError, match="record s: shows no image"):
        similarity_density(model, [sample_of({"input_ids": torch.tensor([[5, 6]])})])


@given(st.lists(st.booleans(), max_size=12))
def test_runs_are_those_of_a_loop(flags):
    expected = []
    for i, flag in enumerate(flags):
        if flag and i and flags[i - 1]:
            expected[-1] = (expected[-1][0], i)
        elif flag:
            expected.append((i, i))
    assert true_runs(torch.tensor(flags, dtype=torch.bool)) == expected
