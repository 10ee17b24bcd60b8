"""Plan banks: what is written and read back, what is refused, and batches that mix tasks."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skipvision_train.calibration.bank import BankFacts, PlanBank, file_name
from skipvision_train.calibration.samples import record_samples
from skipvision_train.data.collate import collate
from skipvision_train.data.images import load_image
from skipvision_train.errors import PlanError
from skipvision_train.plans import SkipPlan, compose, dense, ffn_skip, skip_kv, vskip, vtw

DEPTH = 3
HASH = "0123456789abcdef" * 4
PLANS = {
    "colour": vskip([1]).bind(DEPTH),
    "count": compose([vskip([0], bypass="norm"), ffn_skip([2])]).bind(DEPTH),
    "shape": vtw(2).bind(DEPTH),
}
UNIVERSAL = vskip([2]).bind(DEPTH)


def facts_of(*tasks, **changes):
    facts = BankFacts(
        model_hash=HASH,
        base_plan="dense",
        strategy="vig",
        bypass="zero",
        seed=3,
        samples={task: [f"quiz/{i}" for i in range(2)] for task in tasks},
        versions={"torch": "2.15"},
        created="2026-07-01",
    )
    return replace(facts, **changes)


@pytest.fixture
def bank(tmp_path):
    return PlanBank.create(tmp_path / "bank", PLANS, UNIVERSAL, facts_of(*PLANS))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_index(bank, **changes):
    file = bank.path / "bank.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- writing and reading -------------------------------------------------------------------------------------------


def test_a_bank_is_read_as_it_was_written(tmp_path):
    plans = {task: replace(plan, provenance={"scores": [0.5, 1]}) for task, plan in PLANS.items()}
    PlanBank.create(tmp_path / "deep" / "bank", plans, UNIVERSAL, facts_of(*plans))
    read = PlanBank.load(tmp_path / "deep" / "bank", model_hash=HASH)
    assert read.plans == PLANS
    assert read.universal == UNIVERSAL
    assert read.facts == facts_of(*plans)
    assert read.tasks == tuple(PLANS)
    assert read.plans["colour"].provenance == {"scores": [0.5, 1]}
    assert sorted(contents(read.path)) == ["bank.json", "colour.json", "count.json", "shape.json", "universal.json"]
    assert SkipPlan.load(read.path / "colour.json") == PLANS["colour"]  # as a plan file of its own


ODD = ["colour", "Colour", "a/b", "a b", "../up", "/etc", ".", "", "bank", "universal", "色", "Größe", "x" * 300, "-x"]


def test_every_task_name_has_a_file_of_its_own(tmp_path):
    plans = {task: vskip([i % DEPTH]).bind(DEPTH) for i, task in enumerate(ODD)}
    bank = PlanBank.create(tmp_path / "bank", plans, UNIVERSAL, facts_of(*plans))
    files = {file_name(task).lower() for task in ODD}  # some file systems do not tell cases apart
    assert len(files) == len(ODD)
    assert all(len(file) < 100 and file.isascii() and not file.startswith((".", "-")) for file in files)
    assert set(contents(bank.path)) == files | {"bank.json", "universal.json"}
    assert list(tmp_path.iterdir()) == [bank.path]
    read = PlanBank.load(bank.path)
    assert dict(read.plans) == plans
    assert read.tasks == tuple(ODD)


def test_a_bank_is_replaced_as_a_whole(bank):
    PlanBank.create(bank.path, {"words": PLANS["count"]}, UNIVERSAL, facts_of("words", seed=4))
    assert sorted(contents(bank.path)) == ["bank.json", "universal.json", "words.json"]
    assert PlanBank.load(bank.path).facts.seed == 4
    assert list(bank.path.parent.iterdir()) == [bank.path]


def fail_at(monkeypatch, owner, name, call):
    """The ``call``-th call of a method raises, as on a full disk."""
    stock, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise OSError("no space left")
        return stock(self, *args)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(("owner", "name", "call"), [(SkipPlan, "save", 2), (Path, "rename", 1), (Path, "rename", 2)])
def test_a_failed_write_leaves_the_former_bank(bank, monkeypatch, owner, name, call):
    former = contents(bank.path)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(OSError, match="no space left"):
            PlanBank.create(bank.path, {"words": UNIVERSAL}, UNIVERSAL, facts_of("words"))
    assert contents(bank.path) == former
    assert list(bank.path.parent.iterdir()) == [bank.path]


def test_other_files_are_not_deleted(bank, tmp_path):
    (bank.path / "notes.txt").write_text("mine")
    former = contents(bank.path)
    with pytest.raises(PlanError, match=r"holds notes\.txt, which is no part of a plan bank"):
        PlanBank.create(bank.path, PLANS, UNIVERSAL, facts_of(*PLANS))
    assert contents(bank.path) == former
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "data.json").write_text("{}")
    with pytest.raises(PlanError, match=r"holds data\.json"):
        PlanBank.create(tmp_path / "plain", PLANS, UNIVERSAL, facts_of(*PLANS))
    with pytest.raises(PlanError, match="is no folder"):
        PlanBank.create(tmp_path / "plain" / "data.json", PLANS, UNIVERSAL, facts_of(*PLANS))
    (tmp_path / "empty").mkdir()
    PlanBank.create(tmp_path / "empty", PLANS, UNIVERSAL, facts_of(*PLANS))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_plans_that_do_not_belong_together_are_not_written(tmp_path):
    for plans, message in (
        ({"colour": vskip([1]).bind(4)}, "different depths in one bank: colour 4, the universal plan 3"),
        ({"colour": vskip([1])}, "fits models of several depths"),
        (PLANS, "no sample ids for the plan of 'count'"),
    ):
        with pytest.raises(PlanError, match=message):
            PlanBank.create(tmp_path / "bank", plans, UNIVERSAL, facts_of("colour", "shape"))
    assert list(tmp_path.iterdir()) == []


def test_a_bank_of_another_model_is_refused(bank):
    with pytest.raises(PlanError, match="0123456789ab, this model's is fedcba987654; calibrate this model"):
        PlanBank.load(bank.path, model_hash="fedcba9876543210" * 4)
    assert PlanBank.load(bank.path).facts.model_hash == HASH  # without a model there is nothing to compare


def test_a_damaged_bank_is_refused_by_name(bank):
    PLANS["count"].bind(DEPTH).save(bank.path / "spare.json")
    (bank.path / "count.json").unlink()
    with pytest.raises(PlanError, match=r"the plan file count\.json is missing"):
        PlanBank.load(bank.path)
    vskip([1]).bind(5).save(bank.path / "count.json")
    with pytest.raises(PlanError, match="different depths in one bank: colour 3, count 5, shape 3"):
        PlanBank.load(bank.path)
    (bank.path / "count.json").write_text("{")
    with pytest.raises(PlanError, match=r"count\.json: not JSON"):
        PlanBank.load(bank.path)
    PLANS["count"].save(bank.path / "count.json")
    (bank.path / "universal.json").unlink()
    with pytest.raises(PlanError, match=r"the plan file universal\.json is missing"):
        PlanBank.load(bank.path)


def test_an_index_of_another_form_is_refused(bank, tmp_path):
    edit_index(bank, seed=5)
    assert PlanBank.load(bank.path).facts.seed == 5
    for changes, message in (
        ({"files": 3}, r"bank\.json: not the index of a plan bank"),
        ({"format_version": 9}, r"bank\.json: format_version is 9, expected 1; calibrate again"),
    ):
        edit_index(bank, **changes)
        with pytest.raises(PlanError, match=message):
            PlanBank.load(bank.path)
    (bank.path / "bank.json").write_text("[1]")
    with pytest.raises(PlanError, match="format_version is None"):
        PlanBank.load(bank.path)
    (bank.path / "bank.json").write_text("{")
    with pytest.raises(PlanError, match=r"bank\.json: not JSON"):
        PlanBank.load(bank.path)
    with pytest.raises(PlanError, match=r"absent: no plan bank: it has no bank\.json; skipvision calibrate"):
        PlanBank.load(tmp_path / "absent")


def test_an_index_cannot_name_files_elsewhere(bank, tmp_path):
    UNIVERSAL.save(tmp_path / "colour.json")
    edit_index(bank, files={"colour": "../colour.json"})
    assert PlanBank.load(bank.path).plans == {"colour": PLANS["colour"]}


# --- choosing a plan -----------------------------------------------------------------------------------------------


def test_a_task_without_a_plan_runs_the_universal_one_and_the_log_says_so_once(bank, caplog):
    assert bank.has("count")
    assert not bank.has("words")
    with caplog.at_level(logging.WARNING):
        assert bank.plan_for("count") is bank.plans["count"]
        assert not caplog.messages
        for task in ("words", "words", "", "words"):
            assert bank.plan_for(task) == UNIVERSAL
    assert len(caplog.messages) == 2
    assert "no plan for the task 'words', the universal plan runs; there are plans for colour, count" in caplog.text


def test_rows_of_equal_plans_run_together(tmp_path):
    plans = {**PLANS, "other": UNIVERSAL, "twin": PLANS["colour"]}
    bank = PlanBank.create(tmp_path / "bank", plans, UNIVERSAL, facts_of(*plans))
    tasks = ["count", "twin", "words", "colour", "count", "other"]
    assert bank.groups(tasks) == [(PLANS["count"], [0, 4]), (PLANS["colour"], [1, 3]), (UNIVERSAL, [2, 5])]
    assert bank.groups([]) == []


def test_results_come_back_in_order(bank):
    tasks = ["count", "colour", "words", "count", "colour"]
    results = bank.run_mixed(tasks, lambda plan, rows: [(plan.name, row) for row in rows])
    assert results == [(bank.plan_for(task).name, row) for row, task in enumerate(tasks)]
    with pytest.raises(ValueError, match="1 results of 2 rows"):
        bank.run_mixed(tasks, lambda plan, rows: ["one"])


@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(own_model, own_processor, record, tmp_path):
    """Questions of several lengths and tasks, under plans that make a difference, generated and scored."""
    plans = {
        "colour": compose([skip_kv("small"), ffn_skip([0])]).bind(DEPTH),
        "count": vskip([0, 1], bypass="norm").bind(DEPTH),
    }
    bank = PlanBank.create(tmp_path / "bank", plans, vtw(1).bind(DEPTH), facts_of(*plans))
    tasks = ["colour", "count", "words", "count", "colour", "words"]
    records = [record("?" * (3 * i + 1), "yes", identity=str(i)) for i in range(len(tasks))]

    def under(plan, rows):
        images = [[load_image(records[row].images[0], "")] for row in rows]
        prompts = [
            own_processor.encode_prompt(records[row].turns[:1], own) for row, own in zip(rows, images, strict=True)
        ]
        batch = collate(prompts, padding_side="left", pad_id=own_processor.pad_id)
        own_model.set_plan(plan)
        made = own_model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = own_model(**batch, logits_to_keep=1).logits[:, -1]
        return list(zip(logits, made[:, batch["input_ids"].shape[1] :].tolist(), strict=True))

    expected = [plans[task] if task in plans else vtw(1).bind(DEPTH) for task in tasks]
    dense_plan = dense().bind(DEPTH)
    for (logits, made), row, sample in zip(
        bank.run_mixed(tasks, under), range(len(tasks)), record_samples(own_model, own_processor, records), strict=True
    ):
        ((alone, same),) = under(expected[row], [row])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
        assert made == same
        own_model.set_plan(dense_plan)
        assert (own_model(**sample.inputs).logits[sample.read][0] - logits).abs().max() > 0.01
