"""``skipvision evaluate plan=bank``: answers, blind answers and cost of every record under its own task's plan."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest

from skipvision_train.calibration.bank import BankFacts, PlanBank
from skipvision_train.cli import run_command
from skipvision_train.evaluation.evaluate import file_images, grey_images, predict, sample_cost
from skipvision_train.evaluation.results import EvaluationResult
from skipvision_train.models.identity import model_hash
from skipvision_train.plans import compose, dense, ffn_skip, skip_ffn, vskip

TASKS = ("colour", "count", "pair")


@pytest.fixture
def blindly_right(data, model, processor, records, bank):
    """The questions about images, each with the answer that the model gives to a grey one under its task's plan.

    Those to which it says nothing are left out: an empty answer is no record.
    """
    asked = [record for record in records if record.images]
    grey = grey_images(file_images(asked))
    own = model.plan
    answers = []
    for i, record in enumerate(asked):
        model.set_plan(bank.plan_for(record.task))
        answers += [p.output for p in predict(model, processor, [record], 1, 6, lambda _, i=i: grey(i))]
    model.set_plan(own)
    entries = [entry for entry in json.loads((data / "questions.json").read_text()) if entry["image"]]
    for entry, answer in zip(entries, answers, strict=True):
        entry["conversations"][1]["value"] = answer
    (data / "questions.json").write_text(json.dumps([e for e in entries if e["conversations"][1]["value"]]))
    return data


@pytest.fixture
def bank(model, tmp_path):
    """Plans that differ in cost; "pair" has none of its own."""
    facts = {"base_plan": "", "strategy": "vig", "bypass": "zero", "seed": 0, "versions": {}, "created": "today"}
    plans = {"colour": compose([skip_ffn(), vskip([0, 1])]).bind(3), "count": ffn_skip([0, 1, 2]).bind(3)}
    samples = {task: ["a"] for task in plans}
    return PlanBank.create(
        tmp_path / "bank",
        plans,
        dense().bind(3),
        BankFacts(model_hash=model_hash(model), samples=samples, **facts),
    )


@pytest.fixture
def given(checkpoint, blindly_right, bank):
    """The arguments of a command on those questions under the bank."""
    values = {"checkpoint": checkpoint, "recipe": blindly_right / "recipe.yaml", "data_root": blindly_right}
    return [*(f"{key}={value}" for key, value in values.items()), "plan=bank", f"plan.path={bank.path}"]


def test_blind_and_cost_are_those_of_every_tasks_own_plan(given, bank, model, tmp_path, capsys):
    overrides = ["blind=true", "timing=true", "timing_samples=1", "max_new_tokens=6"]
    run_command("evaluate", [*given, f"output={tmp_path / 'e'}", *overrides])
    text, result = capsys.readouterr().out, EvaluationResult.load(tmp_path / "e" / "evaluation.json")
    assert result.blind.variant == "grey"
    assert result.blind.means["grey"] == result.blind.scores.mean.value == 1
    assert result.scores.mean.value < 1

    costs = []
    for prediction in result.predictions:
        model.set_plan(bank.plan_for(prediction.task))
        costs.append(sample_cost(model, [prediction]))
    assert len({cost.decoder_plan / cost.decoder_dense for cost in costs}) > 2
    for name in ("vision", "connector", "lm_head", "decoder_dense", "decoder_plan", "kv_bytes_dense", "kv_bytes_plan"):
        assert getattr(result.cost, name) == pytest.approx(fmean(getattr(cost, name) for cost in costs))
    assert result.cost.tokens == pytest.approx({k: fmean(c.tokens[k] for c in costs) for k in result.cost.tokens})

    assert (result.plan.name, result.plan.rules) == (f"bank {bank.path}", bank.universal.rules)
    assert result.plan.provenance["plans"] == {task: bank.plan_for(task).to_dict() for task in TASKS}
    assert f"plan bank {bank.path}: decoder" in text
    assert "the universal plan: prefill" in text


def test_one_tasks_plan_for_all_is_a_plan_like_any_other(given, bank, tmp_path, capsys):
    overrides = ["plan.task=count", "blind=true", "max_new_tokens=6"]
    run_command("evaluate", [*given, f"output={tmp_path / 'e'}", *overrides])
    result = EvaluationResult.load(tmp_path / "e" / "evaluation.json")
    assert result.plan == bank.plan_for("count")
    assert result.blind.means["grey"] < 1
    assert "universal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "a bank of another model: its hash is 000000000000"),
        (["plan.task=count"], "a bank of another model: its hash is 000000000000"),
        (["plan.path=/nowhere"], "/nowhere: no plan bank: it has no bank.json"),
        (["output={file}"], "output: {file} is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line(given, bank, tmp_path, overrides, message, capsys):
    PlanBank.create(bank.path, bank.plans, bank.universal, replace(bank.facts, model_hash="0" * 64))
    (tmp_path / "file").write_text("mine")
    overrides = [override.format(file=tmp_path / "file") for override in overrides]
    with pytest.raises(SystemExit):
        run_command("evaluate", [*given, f"output={tmp_path / 'e'}", *overrides])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message.format(file=tmp_path / "file") in error


def test_generate_refuses_a_bank_of_another_model(given, bank, capsys):
    PlanBank.create(bank.path, bank.plans, bank.universal, replace(bank.facts, model_hash="0" * 64))
    (checkpoint,) = [value for value in given if value.startswith("checkpoint=")]
    with pytest.raises(SystemExit):
        run_command("generate", [checkpoint, "prompt=Hello", "plan=bank", f"plan.path={bank.path}"])
    assert "a bank of another model: its hash is 000000000000" in capsys.readouterr().err
