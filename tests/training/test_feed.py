"""What a stage is fed with: from ``data.order``, ``data.group`` and ``data.pack`` to the loader's items."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from counted import count_tokens

from skipvision_train.config.resolve import load_tokenizer, model_config
from skipvision_train.config.validate import validate
from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.errors import ConfigError
from skipvision_train.training.batching import TrainCollator
from skipvision_train.training.feed import open_feed


@pytest.fixture
def feed_of(make_cfg, tmp_path):
    """``feed_of(*overrides)``: the feed, the data set below it, and the configuration."""

    def make(*overrides):
        cfg = make_cfg(*overrides)
        validate(cfg, 1)
        tokenizer = load_tokenizer(cfg)
        processor = SkipVisionProcessor.from_config(model_config(cfg, tokenizer), tokenizer, cfg.stage.template)
        records = load_records(load_recipe(cfg.data.recipe, cfg.data.root))
        dataset = RecordDataset(records, processor, cfg.stage.template, cfg.data.max_length)
        return open_feed(cfg, records, dataset, tmp_path / "run"), dataset, cfg

    return make


def test_by_default_samples_are_shuffled(feed_of):
    feed, dataset, _ = feed_of()
    assert (feed.rows, feed.unit, feed.pack_length, feed.grouping) == (12, "samples", None, None)
    assert feed.dataset[3].input_ids == dataset[3].input_ids
    sampler = feed.sampler(4, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(12))
    assert order != sorted(order)
    assert list(feed_of("data.order=sequential")[0].sampler(4, 0)) == sorted(order)


def test_shards_are_those_of_the_mixture(feed_of):
    feed, dataset, _ = feed_of("data.order=shards", "data.shard_buffer=3")
    assert feed.rule.shards == dataset.records.shards
    assert feed.rule.buffer == 3
    assert sorted(feed.sampler(4, 0)) == list(range(12))


def test_modality_groups_leave_text_apart(feed_of):
    feed, dataset, _ = feed_of("data.group=modality")
    has_image = [bool(record.images) for record in dataset.records]
    batches = [list(feed.sampler(2, 0))[i : i + 2] for i in range(0, 12, 2)]
    assert all(has_image[a] == has_image[b] for a, b in batches)
    assert feed_of("data.group=length")[0].grouping.has_image is None


@pytest.mark.parametrize("order", ["shuffle", "shards", "sequential"])
def test_packed_rows_hold_every_record_once_and_are_full(feed_of, order):
    feed, dataset, _ = feed_of("data.pack=true", "data.pack_length=320", f"data.order={order}")
    assert (feed.unit, feed.pack_length) == ("rows", 320)
    rows = [feed.dataset[i] for i in range(feed.rows)]
    found = sorted(example.input_ids for example in chain(*rows))
    assert found == sorted(dataset[i].input_ids for i in range(12))
    assert sorted(feed.sampler(1, 0)) == list(range(feed.rows))
    batch = TrainCollator(0, pack_length=feed.pack_length)(rows)
    assert batch["input_ids"].shape == (feed.rows, max(sum(len(e.input_ids) for e in row) for row in rows))
    _, real, places = count_tokens([batch]).tolist()
    assert real == sum(map(len, found))
    assert real / places > 0.6  # twelve records of about 70 tokens


def test_measured_lengths_are_kept_with_the_run_and_fit_their_data(feed_of, tmp_path, monkeypatch):
    feed_of("data.pack=true")
    kept = [path.name for path in (tmp_path / "run").iterdir()]
    assert len(kept) == 1
    monkeypatch.setattr("skipvision_train.data.lengths._measure", None)
    feed_of("data.pack=true")  # nothing is measured twice
    with pytest.raises(TypeError):
        feed_of("data.pack=true", "data.max_length=200")


def test_estimated_lengths_need_no_file(feed_of, tmp_path):
    feed, dataset, _ = feed_of("data.pack=true", "data.pack_by=estimated", "data.pack_length=320")
    assert not (tmp_path / "run").exists()
    batch = TrainCollator(0, pack_length=320)([feed.dataset[i] for i in range(feed.rows)])
    assert batch["input_ids"].shape[1] <= 320
    assert int(batch["attention_mask"].sum()) == sum(len(dataset[i].input_ids) for i in range(12))


def test_a_failure_names_the_record(feed_of):
    feed, dataset, _ = feed_of()
    dataset.processor.encode = None
    with pytest.raises(RuntimeError, match=f"^record {dataset.records[2].id} of tiny: TypeError"):
        feed.dataset[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.order=random"], r"^data\.order: 'random' is unknown; use shuffle, shards, sequential"),
        (["data.group=size"], r"^data\.group: 'size' is unknown; use none, length, modality"),
        (["data.pack_by=guess"], r"^data\.pack_by: 'guess' is unknown; use measured, estimated"),
        (["data.shard_buffer=0"], r"^data\.shard_buffer: 0 is out of range; use 1 or more"),
        (["data.pack_length=512"], r"^data\.pack_length: 512 without data\.pack; set data\.pack=true, or null"),
        (["data.pack=true", "data.group=length"], r"^data\.group: length with data\.pack"),
        (["data.pack=true", "data.pack_length=100"], r"^data\.pack_length: 100 is less than data\.max_length 256"),
        (
            ["data.pack=true", "plan.method=sparsevlm", "plan.layers=[0]", "plan.keep=[4]"],
            r"^data\.pack: true under plan\.method sparsevlm",
        ),
    ],
)
def test_what_cannot_work_is_refused(make_cfg, overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(make_cfg(*overrides), 1)


def test_an_empty_mixture_is_refused(feed_of):
    _, dataset, cfg = feed_of()
    with pytest.raises(ConfigError, match=r"^data\.recipe: it gives no records"):
        open_feed(cfg, dataset.records[:0], dataset, None)


def test_bins_do_not_depend_on_the_number_of_workers(feed_of):
    alone, several = (feed_of("data.pack=true", f"trainer.workers={n}")[0].dataset.bins for n in (0, 2))
    assert np.array_equal(alone.members, several.members)
    assert np.array_equal(alone.starts, several.starts)
