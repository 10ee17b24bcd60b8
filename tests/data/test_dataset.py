"""Records by index, and what happens to the ones that cannot be used."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from skipvision_train.data.collate import collate
from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.errors import ConfigError, DataError


@pytest.fixture
def records(record, turns, picture, tmp_path):
    """Six records; the images of 1 and 4 are broken."""
    for index in range(6):
        picture(seed=index).save(tmp_path / f"{index}.png")
    for index in (1, 4):
        whole = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(whole[: len(whole) // 2])
    return [
        record(turns("<image>\nWhat?", f"answer {i}"), [tmp_path / f"{i}.png"], identity=f"id{i}") for i in range(6)
    ]


def test_items_are_the_encoded_records(records, processor, picture):
    dataset = RecordDataset(records, processor)
    assert len(dataset) == 6
    found, expected = dataset[2], processor.encode(records[2], [picture(seed=2)])
    assert found.input_ids == expected.input_ids
    assert torch.equal(found.pixel_values, expected.pixel_values)


def test_template_and_length_are_handed_on(records, processor):
    plain = RecordDataset(records, processor, template="plain")[0]
    assert processor.decode([t for t in plain.labels if t != -100]) == "answer 0<|eot_id|>"
    with pytest.raises(DataError, match="record id0 of test: the first question and answer take"):
        RecordDataset(records, processor, max_length=12)[0]


def test_error_policy_names_file_and_record(records, processor):
    with pytest.raises(DataError, match=r"1\.png \(record id1 of test\)"):
        RecordDataset(records, processor)[1]


def test_skip_policy_counts_logs_and_leaves_out(records, processor, caplog):
    dataset = RecordDataset(records, processor, on_error="skip", error_budget=2)
    batches = list(DataLoader(dataset, batch_size=3, collate_fn=partial(collate, padding_side="right", pad_id=0)))
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2]
    assert dataset.skipped == 2
    assert re.search(r"left out record 1 \(1 so far\): .*1\.png \(record id1 of test\): no image", caplog.text)
    assert re.search(r"left out record 4 \(2 so far\): .*4\.png \(record id4 of test\): no image", caplog.text)


def test_budget_stops_the_run_and_names_the_count(records, processor):
    dataset = RecordDataset(records, processor, on_error="skip", error_budget=1)
    assert dataset[1] is None
    with pytest.raises(DataError, match=r"2 records could not be used, data.error_budget is 1; the last: .*4\.png"):
        dataset[4]


def test_a_record_that_is_met_again_counts_once(records, processor):
    dataset = RecordDataset(records, processor, on_error="skip", error_budget=2)
    assert [dataset[i] for i in (1, 4, 1, 4, 1)] == [None] * 5
    assert dataset.skipped == 2


@pytest.fixture
def mixture(tmp_path, llava, write_json, picture):
    """Two sources: of ``strict`` record 1 has no image file, of ``loose`` 0 leaves the root, 1 is no conversation."""
    picture().save(tmp_path / "0.png")
    fine = llava("<image>\nWhat?", "answer", image="0.png")
    write_json([fine, fine | {"image": "gone.png"}, fine], "strict.json")
    write_json([fine | {"image": "../0.png"}, {"id": "odd"}, fine], "loose.json")

    def make(**loose):
        sources = [{"name": name, "path": f"{name}.json", "image_root": "."} for name in ("strict", "loose")]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"sources": [sources[0], sources[1] | loose]}))
        return load_records(load_recipe(tmp_path / "mine.yaml"))

    return make


def test_one_policy_for_files_records_and_images(mixture, processor):
    dataset = RecordDataset(mixture(), processor, on_error="skip", error_budget=3)
    assert [dataset[i] is None for i in range(6)] == [False, True, False, True, True, False]
    assert dataset.skipped == 3
    with pytest.raises(
        DataError, match=r"3 records could not be used, data.error_budget is 2; the last: .*\(id 'odd'\)"
    ):
        list(RecordDataset(mixture(), processor, on_error="skip", error_budget=2))


def test_a_source_may_have_a_budget_of_its_own(mixture, processor):
    dataset = RecordDataset(mixture(max_malformed=2), processor)
    assert [dataset[i] is None for i in (3, 4, 3)] == [True] * 3
    with pytest.raises(DataError, match=r"gone\.png .*no such image"):
        dataset[1]
    dataset = RecordDataset(mixture(max_malformed=1), processor, on_error="skip", error_budget=1)
    assert [dataset[i] for i in (1, 3)] == [None, None]  # each counts against its own budget
    with pytest.raises(DataError, match="2 records could not be used, max_malformed of loose is 1; the last: "):
        dataset[4]
    with pytest.raises(DataError, match="1 records could not be used, max_malformed of loose is 0"):
        RecordDataset(mixture(max_malformed=0), processor, on_error="skip")[3]


def test_lengths_of_a_mixture_come_without_reading(mixture, processor, monkeypatch):
    found = mixture()
    expected = [14 + (13 + 1 + 6) // 4] * 6
    expected[4] = 0
    lengths = RecordDataset(found, processor).lengths
    assert [abs(a - b) <= 8 for a, b in zip(lengths, expected, strict=True)] == [True] * 6
    monkeypatch.setattr(type(found), "__getitem__", lambda *_: pytest.fail("a record was read"))
    assert RecordDataset(found, processor).lengths == lengths


def test_workers_share_the_budget(records, processor):
    dataset = RecordDataset(records, processor, on_error="skip", error_budget=2)
    loader = DataLoader(
        dataset, batch_size=3, num_workers=2, collate_fn=partial(collate, padding_side="right", pad_id=0)
    )
    assert sum(batch["input_ids"].shape[0] for batch in loader) == 4
    assert dataset.skipped == 2


def test_lengths_order_samples_by_size(records, record, turns, processor):
    more = [record(turns("a", "b" * 400)), record(turns("a", "b"))]
    lengths = RecordDataset([records[0], *more], processor).lengths
    assert lengths == [14 + (13 + 1 + 7) // 4 + 0, 100, 0]


def test_wrong_policies(records, processor):
    with pytest.raises(ConfigError, match=r"data.on_error: 'ignore' is unknown; use error or skip"):
        RecordDataset(records, processor, on_error="ignore")
    with pytest.raises(ConfigError, match=r"data.error_budget: -1"):
        RecordDataset(records, processor, error_budget=-1)
