"""Lengths before encoding are the lengths of what encoding gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.lengths import estimated_lengths, measured_lengths
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.errors import DataError
from skipvision_train.models.settings import ReducerConfig, TilingConfig


@pytest.fixture
def records(record, turns, tmp_path):
    """Images of several shapes, two in one record, none in another; several turns."""
    for name, size in (("wide", (60, 20)), ("high", (20, 60)), ("square", (30, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    rows = [
        (("<image>\nWhat?", "one two three"), ["wide.png"]),
        (("Compare <image> and <image>", "equal", "Why?", "because " * 9), ["high.png", "square.png"]),
        (("Hello", "hi"), []),
        (("<image>", "Paris is the capital of France"), ["square.png"]),
    ]
    return [
        record(turns(*text), [tmp_path / f for f in files], identity=str(i)) for i, (text, files) in enumerate(rows)
    ]


@pytest.fixture
def tiled(config_factory, fresh_tokenizer, image_id):
    config = config_factory(
        image_token_id=image_id,
        tiling=TilingConfig("aspect", 3),
        reducer=ReducerConfig(split="tiles", local_keep=20, former_over="retained"),
    )
    return SkipVisionProcessor.from_config(config, fresh_tokenizer)


@pytest.mark.parametrize("which", ["processor", "tiled"])
@pytest.mark.parametrize("template", [None, "plain"])
def test_measured_is_what_encoding_gives(which, template, records, request):
    dataset = RecordDataset(records, request.getfixturevalue(which), template)
    if template == "plain":
        dataset.records = [records[0], records[3]]  # one picture and its caption
    expected = [len(dataset[i].input_ids) for i in range(len(dataset))]
    assert len(set(expected)) == len(expected)
    found = measured_lengths(dataset)
    assert found.tolist() == expected
    assert found.dtype == np.int32


def test_workers_change_nothing(records, processor):
    dataset = RecordDataset(records * 200, processor)
    once = measured_lengths(RecordDataset(records, processor))
    assert np.array_equal(measured_lengths(dataset, workers=2), np.tile(once, 200))


def test_measuring_draws_no_random_number(records, processor):
    before = torch.get_rng_state()
    measured_lengths(RecordDataset(records, processor))
    assert torch.equal(torch.get_rng_state(), before)


def test_max_length_cuts_before_measuring(records, processor):
    whole = measured_lengths(RecordDataset(records, processor))
    cut = measured_lengths(RecordDataset(records, processor, max_length=int(whole[1]) - 1))
    assert cut[1] < whole[1] - 1
    assert cut[[0, 2, 3]].tolist() == whole[[0, 2, 3]].tolist()


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_an_unusable_record_counts_one(records, tiled, tmp_path, policy):
    (tmp_path / "wide.png").write_bytes(b"no image")
    found = measured_lengths(RecordDataset(records, tiled, on_error=policy))
    assert found[0] == 1
    assert (found[1:] > 1).all()


def test_the_file_is_read_instead_of_the_records(records, processor, tmp_path):
    dataset, cache = RecordDataset(records, processor), tmp_path / "run" / "lengths-0.npy"
    found = measured_lengths(dataset, cache=cache)
    assert [path.name for path in cache.parent.iterdir()] == ["lengths-0.npy"]
    dataset.records = [None] * 4  # nothing is measured again
    assert np.array_equal(measured_lengths(dataset, cache=cache), found)
    dataset.records = records[:3]
    with pytest.raises(DataError, match=r"lengths-0\.npy: holds 4 lengths, the data has 3 records; delete it"):
        measured_lengths(dataset, cache=cache)


def test_processes_of_two_machines_do_not_share_a_temporary_file(records, processor, tmp_path, monkeypatch):
    """Whatever their process ids are: one measures and writes while the other does."""
    dataset, cache, save, names = RecordDataset(records, processor), tmp_path / "lengths-0.npy", np.save, []

    def both_at_once(path, lengths):
        names.append(path.name)
        save(path, lengths)
        if len(names) == 1:
            measured_lengths(dataset, cache=cache)

    monkeypatch.setattr(np, "save", both_at_once)
    measured_lengths(dataset, cache=cache)
    assert len(set(names)) == 2
    assert [path.name for path in tmp_path.glob("lengths*")] == ["lengths-0.npy"]


def test_an_estimate_is_calibrated(record, turns, processor):
    """Every text has one token a byte under this tokenizer's few merges, or a little less: so says the estimate."""
    rng = np.random.default_rng(0)
    records = [record(turns("q", "x" * int(n)), identity=str(i)) for i, n in enumerate(rng.integers(20, 150, 300))]
    dataset = RecordDataset(records, processor, max_length=170)
    text = np.array([sum(len(turn.text) for turn in r.turns) for r in records])
    found = estimated_lengths(dataset, text, np.zeros(300, np.int32))
    true = measured_lengths(dataset)
    assert 0.85 < (found >= true).mean() < 1.0
    assert found.max() <= 170
    assert abs(found / true - 1).mean() < 0.3


def test_an_estimate_knows_the_images(records, processor):
    dataset = RecordDataset([replace(records[3], id=str(i)) for i in range(5)], processor)
    images, text = np.ones(5, np.int32), np.full(5, 30)
    assert estimated_lengths(dataset, text, images).tolist() == measured_lengths(dataset).tolist()
