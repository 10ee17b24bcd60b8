"""``skipvision calibrate`` on a LLaVA directory: files in, plans out; on one process and on two, also broken off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from tiny_vlms import make_family

from skipvision_train import apply
from skipvision_train.calibration import session
from skipvision_train.calibration.bank import PlanBank
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.calibration.subject import load_subject, model_hash
from skipvision_train.calibration.sweep import SweepOptions
from skipvision_train.cli import run_command
from skipvision_train.errors import PlanError
from skipvision_train.plans import SkipPlan


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A saved tiny LLaVA with its processor, and nine prompts of three tasks in a JSONL file."""
    folder = tmp_path_factory.mktemp("llava")
    family = make_family("llava")
    family.processor.tokenizer.eos_token = "w9"
    family.model.save_pretrained(folder / "model")
    family.processor.save_pretrained(folder / "model")
    lines = []
    for i in range(9):
        image = family.images[i % 3].rotate(10 * i)
        image.save(folder / f"{i}.png")
        lines.append(
            {"id": str(i), "image": f"{i}.png", "prompt": f"w1 w{i} w2", "answer": "w3 w4", "task": "abc"[i % 3]}
        )
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def arguments(workspace, output, *overrides):
    return [
        f"checkpoint={workspace / 'model'}",
        f"prompts={workspace / 'prompts.jsonl'}",
        f"output={output}",
        "samples=6",
        "device=cpu",
        *overrides,
    ]


def scores_of(folder):
    return ScoreTable.from_dict(json.loads((folder / "scores.json").read_text()))


@pytest.fixture(scope="module")
def alone(workspace):
    run_command("calibrate", arguments(workspace, workspace / "alone"))
    return workspace / "alone"


def test_plan_and_scores_of_a_model_of_transformers(workspace, alone, capsys):
    plan, table = SkipPlan.load(alone / "plan.json"), scores_of(alone)
    assert table.values.shape == (3, 6)
    assert (table.values[-1] == 0).all()
    assert (table.values[:-1] > 0).all()
    assert sorted(table.tasks) == ["a", "a", "b", "b", "c", "c"]
    assert plan.layers_without_attention() == (2,)  # half of three, and the last layer costs nothing
    assert not (alone / "partial.json").exists()
    model, _, is_ours = load_subject(str(workspace / "model"))
    assert not is_ours
    assert plan.provenance["model_hash"] == model_hash(model)
    with apply(model, plan):
        pass
    assert {p.name for p in alone.glob("*.png")} == {"vig.png", "vig_by_task.png", "skip_map.png"}


def on_two_processes(workspace, output, *overrides):
    """What the command prints when two processes share it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    command += ["skipvision_train", "calibrate", *arguments(workspace, output, *overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_one_sample_is_shared_by_two_processes_in_a_search(workspace, tmp_path, capsys):
    """One process has nothing to measure, and takes the same steps: it counts the other's tokens."""
    overrides = ["samples=1", "strategy.search=joint", "strategy.rescore=true", "budget=flops", "budget.flops=0.9"]
    run_command("calibrate", arguments(workspace, tmp_path / "one", *overrides))
    saving = capsys.readouterr().out.split("prefill of the decoder: ")[1]
    done = on_two_processes(workspace, tmp_path / "two", *overrides)
    assert done.stdout.split("prefill of the decoder: ")[1] == saving
    assert SkipPlan.load(tmp_path / "two" / "plan.json") == SkipPlan.load(tmp_path / "one" / "plan.json")


def test_two_processes_give_the_same_numbers_and_the_same_plan(workspace, alone):
    """Three samples each, in the order of the samples."""
    output = workspace / "two"
    done = on_two_processes(workspace, output)
    assert scores_of(output).samples == scores_of(alone).samples
    torch.testing.assert_close(scores_of(output).values, scores_of(alone).values, atol=1e-9, rtol=1e-6)
    assert SkipPlan.load(output / "plan.json") == SkipPlan.load(alone / "plan.json")
    assert done.stdout.count("layer          vig") == 1


def test_a_run_that_was_broken_off_goes_on(workspace, alone, monkeypatch, tmp_path, caplog):
    """One group of layers at a time: the second run finds the first layer finished."""
    monkeypatch.setattr(session, "SweepOptions", partial(SweepOptions, group=1))
    keep = session.Partial.keep

    def stop(self, layer, values):
        keep(self, layer, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Partial, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        run_command("calibrate", arguments(workspace, tmp_path / "c"))
    assert list(json.loads((tmp_path / "c" / "partial.json").read_text())["layers"]) == ["0"]
    monkeypatch.setattr(session.Partial, "keep", keep)
    with caplog.at_level("INFO"):
        run_command("calibrate", arguments(workspace, tmp_path / "c"))
    assert "going on after 1 finished layers" in caplog.text
    # Groups of one share no batch: the rest is rounding.
    torch.testing.assert_close(scores_of(tmp_path / "c").values, scores_of(alone).values, atol=1e-7, rtol=1e-4)
    assert SkipPlan.load(tmp_path / "c" / "plan.json") == SkipPlan.load(alone / "plan.json")


def test_a_bank_holds_a_plan_for_every_task(workspace, tmp_path):
    run_command(
        "calibrate",
        arguments(workspace, tmp_path, "bank=true", "samples=2", "draws=2", "budget=count", "budget.count=2"),
    )
    bank = PlanBank.load(tmp_path / "bank")
    assert bank.tasks == ("a", "b", "c")
    assert all(len(bank.plan_for(task).layers_without_attention()) == 2 for task in "abcz")
    assert len(json.loads((tmp_path / "seeds.json").read_text())["scores"]) == 2
    with pytest.raises(PlanError, match="another model"):
        PlanBank.load(tmp_path / "bank", model_hash="0" * 64)


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["strategy.search=greedy", "budget=count", "budget.count=2"], 2),
        (["strategy=vig_ffn", "strategy.search=greedy", "budget=count", "budget.count=1"], 1),
        (["strategy=shortv", "budget=count", "budget.count=1", "positions=answer"], 1),
        (["strategy=random", "budget=share", "budget.share=0.7"], 2),
        (["budget=total", "budget.total=1e9"], 3),
        (["budget=threshold", "budget.threshold=0"], 1),
    ],
)
def test_strategies_and_budgets(workspace, tmp_path, overrides, layers):
    run_command("calibrate", arguments(workspace, tmp_path, *overrides))
    plan = SkipPlan.load(tmp_path / "plan.json")
    assert len(set(plan.layers_without_attention()) | set(plan.layers_without_ffn())) == layers


def test_joint_search_meets_its_flops_budget(workspace, tmp_path, capsys):
    run_command(
        "calibrate", arguments(workspace, tmp_path, "strategy.search=joint", "budget=flops", "budget.flops=0.9")
    )
    share = float(capsys.readouterr().out.split("prefill of the decoder: ")[1].split(" %")[0])
    assert share <= 90.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samples=10"], "samples: 10"),
        (["budget=count", "budget.count=4"], "budget.count: 4; the model has 3 layers"),
        (["budget.count=1"], "budget: count and share are given"),
        (["strategy.search=joint"], "strategy.search=joint needs budget=flops; found share"),
        (["recipe=sketches"], "recipe: give either recipe=... or prompts=..."),
        (["bank=true", "task=a"], "bank: a bank holds a plan for every task"),
        (["strategy.name=gain"], "strategy: 'gain' is unknown"),
        (["positions=all"], "positions: 'all' is unknown"),
    ],
)
def test_mistakes_are_one_line(workspace, tmp_path, overrides, message, capsys):
    with pytest.raises(SystemExit):
        run_command("calibrate", arguments(workspace, tmp_path / "x", *overrides))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "x" / "plan.json").exists()
