"""Records by index, and what happens to the ones that cannot be used."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from skipvision_train.data.collate import collate
from skipvision_train.data.dataset import RecordDataset
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
    assert "left out record id1 of test (1 so far)" in caplog.text
    assert "left out record id4 of test (2 so far)" in caplog.text


def test_budget_stops_the_run_and_names_the_count(records, processor):
    dataset = RecordDataset(records, processor, on_error="skip", error_budget=1)
    assert dataset[1] is None
    with pytest.raises(DataError, match=r"2 records could not be used, data.error_budget is 1; the last: .*4\.png"):
        dataset[4]


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
