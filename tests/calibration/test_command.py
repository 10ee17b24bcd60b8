"""``skipvision calibrate`` on a LLaVA directory: files in, plans out; on one process and on two, also broken off."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import combinations

import pytest
import torch
from tiny_vlms import make_family

from skipvision_train import apply
from skipvision_train.analysis.calibration_report import layer_table, read_calibration, section
from skipvision_train.calibration import session
from skipvision_train.calibration.bank import PlanBank
from skipvision_train.calibration.samples import prompt_samples, read_jsonl
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.calibration.sweep import SweepOptions
from skipvision_train.cli import run_command
from skipvision_train.errors import DataError, PlanError
from skipvision_train.evaluation.equal_flops import layer_orders
from skipvision_train.inference.loading import load_model
from skipvision_train.models.identity import model_hash
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
    run_command("calibrate", arguments(workspace, workspace / "alone", "transfer=true"))
    return workspace / "alone"


def kl_by_hand(workspace, plan, ids, positions="next"):
    """(ids,) KL(P || P under the plan) of the workspace's prompts, from forwards of the model."""
    model, processor, _ = load_model(str(workspace / "model"))
    records = {f"prompts/{record.id}": record for record in read_jsonl(workspace / "prompts.jsonl")}
    values = []
    for sample in prompt_samples(model, processor, [records[i] for i in ids], positions):
        with torch.no_grad():
            p = model(**sample.inputs).logits[sample.read].double().log_softmax(-1)
            with apply(model, plan):
                q = model(**sample.inputs).logits[sample.read].double().log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(values)


def test_plan_and_scores_of_a_model_of_transformers(workspace, alone, capsys):
    plan, table = SkipPlan.load(alone / "plan.json"), scores_of(alone)
    assert table.values.shape == (3, 6)
    assert (table.values[-1] == 0).all()
    assert (table.values[:-1] > 0).all()
    assert sorted(table.tasks) == ["a", "a", "b", "b", "c", "c"]
    assert plan.layers_without_attention() == (2,)  # half of three, and the last layer costs nothing
    assert not (alone / "partial.json").exists()
    model, _, is_ours = load_model(str(workspace / "model"))
    assert not is_ours
    assert plan.provenance["model_hash"] == model_hash(model)
    with apply(model, plan):
        pass
    assert {p.name for p in alone.glob("*.png")} == {"vig.png", "vig_by_task.png", "skip_map.png", "transfer.png"}


def on_two_processes(workspace, output, *overrides, folders=""):
    """What the command prints when two processes share it, each in its own one of ``folders`` if some are given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python"]
    command += ["sh", "-c", (f'cd "{folders}/$RANK" && ' if folders else "") + 'exec "$@"', "sh", sys.executable]
    command += ["-m", "skipvision_train", "calibrate", *arguments(workspace, output, *overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_one_sample_is_shared_by_two_processes_in_a_search(workspace, tmp_path, capsys, monkeypatch):
    """One process has nothing to measure, and takes the same steps: it counts the other's tokens.

    Each has an output folder of its own, and only the first one's holds finished layers.
    """
    overrides = ["samples=1", "strategy.search=joint", "strategy.rescore=true", "budget=flops", "budget.flops=0.9"]
    monkeypatch.setattr(session.Session, "forget", lambda self: None)
    run_command("calibrate", arguments(workspace, tmp_path / "one", *overrides))
    saving = capsys.readouterr().out.split("prefill of the decoder: ")[1]
    for rank in "01":
        (tmp_path / rank / "two").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "partial.json", tmp_path / "0" / "two")
    done = on_two_processes(workspace, "two", *overrides, folders=tmp_path)
    assert done.stdout.split("prefill of the decoder: ")[1] == saving
    assert done.stderr.count("going on after 2 finished layers") == 1
    assert SkipPlan.load(tmp_path / "0" / "two" / "plan.json") == SkipPlan.load(tmp_path / "one" / "plan.json")
    assert list((tmp_path / "1" / "two").iterdir()) == []


def test_two_processes_give_the_same_numbers_and_the_same_plan(workspace, alone):
    """Three samples each, in the order of the samples."""
    output = workspace / "two"
    done = on_two_processes(workspace, output, "transfer=true")
    assert scores_of(output).samples == scores_of(alone).samples
    torch.testing.assert_close(scores_of(output).values, scores_of(alone).values, atol=1e-9, rtol=1e-6)
    assert SkipPlan.load(output / "plan.json") == SkipPlan.load(alone / "plan.json")
    assert done.stdout.count("layer          vig") == 1
    one, two = (json.loads((folder / "transfer.json").read_text())["kl"] for folder in (alone, output))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=1e-9, rtol=1e-6)


def test_transfer_is_the_cost_of_every_tasks_plan_on_every_tasks_samples(workspace, tmp_path, capsys):
    overrides = ["budget=count", "budget.count=2", "transfer=true", "bank=true", "samples=2"]
    run_command("calibrate", arguments(workspace, tmp_path, *overrides))
    matrix, table, bank = json.loads((tmp_path / "transfer.json").read_text()), scores_of(tmp_path), tmp_path / "bank"
    assert matrix["calibrated_on"] == matrix["evaluated_on"] == ["a", "b", "c"]
    for row, task in zip(matrix["kl"], "abc", strict=True):
        for value, other in zip(row, "abc", strict=True):
            ids = [name for name, own in zip(table.samples, table.tasks, strict=True) if own == other]
            expected = kl_by_hand(workspace, PlanBank.load(bank).plan_for(task), ids).mean()
            assert value == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert read_calibration(tmp_path).transfer.values["kl"] == matrix["kl"]
    captions = [figure["alt"] for figure in section("c", read_calibration(tmp_path))["figures"]]
    assert captions == ["Score per layer and task, c", "Layers that skip, by budget", "Transfer, kl"]

    (tmp_path / "scores_shortv.json").write_text("mine")
    with pytest.raises(SystemExit):
        run_command("calibrate", arguments(workspace, tmp_path, *overrides[:2]))
    message = f"output: {tmp_path} holds results of another configuration: bank (True before, False now), samples (2"
    assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "transfer.json").read_text()) == matrix
    run_command("calibrate", arguments(workspace, tmp_path, *overrides[:2], "overwrite=true"))
    assert (tmp_path / "scores_shortv.json").read_text() == "mine"
    (tmp_path / "scores_shortv.json").unlink()
    assert read_calibration(tmp_path).transfer is None
    assert {path.name for path in tmp_path.iterdir()} == {
        *("plan.json", "vig.json", "scores.json", "vig.png", "vig_by_task.png", "skip_map.png", "calibrate.run.json")
    }


@pytest.mark.parametrize("positions", ["next", "answer"])
def test_the_cost_that_greedy_reports_is_that_of_the_final_plan(workspace, tmp_path, positions, capsys):
    overrides = ["strategy.search=greedy", "budget=count", "budget.count=3", f"positions={positions}"]
    run_command("calibrate", arguments(workspace, tmp_path, *overrides))
    found, plan = json.loads((tmp_path / "vig.json").read_text())["kl"], SkipPlan.load(tmp_path / "plan.json")
    values = kl_by_hand(workspace, plan, scores_of(tmp_path).samples, positions)
    assert found["value"] == pytest.approx(float(values.mean()), rel=1e-3)
    half = 1.959964 * float(values.std()) / len(values) ** 0.5
    assert found["high"] - found["value"] == pytest.approx(half, rel=1e-3)
    assert f"the whole plan moves the output by {found['value']:.3e} nats" in capsys.readouterr().out
    added = scores_of(tmp_path).mean().sum()
    assert found["value"] != pytest.approx(float(added), rel=1e-2)  # scores of single layers do not add up to it


def test_wandb_gets_the_pictures_and_the_scores(workspace, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    overrides = ["wandb_project=p", "transfer=true", "draws=2", "budget=threshold", "budget.threshold=0.01"]
    run_command("calibrate", arguments(workspace, tmp_path / "c", *overrides))
    wandb.teardown()  # waits for the process that writes the file
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = {path.name.split("_0_")[0] for path in (run / "files" / "media" / "images").iterdir()}
    assert logged == {"vig", "vig_by_task", "skip_map", "seeds", "transfer"}
    assert {path.stem for path in (tmp_path / "c").glob("*.png")} == logged
    (log,) = run.glob("*.wandb")
    assert b"score/layer_2" in log.read_bytes()


def test_a_run_that_was_broken_off_goes_on(workspace, alone, monkeypatch, tmp_path, caplog, capsys):
    """One group of layers at a time: the second run finds the first layer finished."""
    monkeypatch.setattr(session, "SweepOptions", partial(SweepOptions, group=1))
    keep = session.Partial.keep

    def stop(self, layer, values):
        keep(self, layer, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Partial, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        run_command("calibrate", arguments(workspace, tmp_path / "c"))
    finished = (tmp_path / "c" / "partial.json").read_text()
    assert list(json.loads(finished)["layers"]) == ["0"]
    monkeypatch.setattr(session.Partial, "keep", keep)
    others = shutil.copytree(workspace, tmp_path / "others", ignore=shutil.ignore_patterns("model"))
    for overrides, differing in (
        (["positions=answer", "seed=1"], "positions, samples"),
        ([f"prompts={others / 'prompts.jsonl'}"], "prompts"),  # lines of the same numbers
        (["image_token_id=5"], "image_token_id"),
    ):
        with pytest.raises(SystemExit):
            run_command("calibrate", arguments(workspace, tmp_path / "c", *overrides))
        assert f"that differs in {differing}; name another output=..., or begin" in capsys.readouterr().err
    assert (tmp_path / "c" / "partial.json").read_text() == finished
    with caplog.at_level("INFO"):
        run_command("calibrate", arguments(workspace, tmp_path / "c"))
    assert "going on after 1 finished layers" in caplog.text
    # Groups of one share no batch: the rest is rounding.
    torch.testing.assert_close(scores_of(tmp_path / "c").values, scores_of(alone).values, atol=1e-7, rtol=1e-4)
    assert SkipPlan.load(tmp_path / "c" / "plan.json") == SkipPlan.load(alone / "plan.json")
    assert not (tmp_path / "c" / "partial.json").exists()


def test_finished_layers_of_another_calibration_are_left_aside_where_that_is_wanted(tmp_path):
    session.Partial(tmp_path / "partial.json", {"model": "a", "seed": 0}).keep(3, torch.ones(2))
    for model, found in (("a", [3]), ("b", [])):
        store = session.Partial(tmp_path / "partial.json", {"model": model, "seed": 0}, overwrite=True)
        assert list(store.read()) == found
    store.keep(1, torch.ones(2))
    assert list(session.Partial(tmp_path / "partial.json", store.key).read()) == [1]


def test_a_calibration_that_was_stopped_while_it_wrote_is_not_read(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "c")
    record = json.loads((tmp_path / "c" / "calibrate.run.json").read_text())
    (tmp_path / "c" / "calibrate.run.json").write_text(json.dumps({**record, "finished": False}))
    (tmp_path / "c" / "transfer.json").unlink()
    with pytest.raises(DataError, match="skipvision calibrate was stopped while it wrote these results"):
        read_calibration(tmp_path / "c")
    with pytest.raises(DataError, match="skipvision calibrate was stopped"):
        layer_orders(3, str(tmp_path / "c"))


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


def test_a_universal_plan_of_one_task_is_told_with_the_scores_and_records_of_that_task(workspace, tmp_path, capsys):
    """The threshold lies between the task's score of a layer and all samples' of it: these would choose otherwise."""
    overrides = ["bank=true", "universal=a", "samples=2", "draws=2", "overwrite=true"]
    run_command("calibrate", arguments(workspace, tmp_path, *overrides))
    table = scores_of(tmp_path)
    layer = int((table.mean("a") - table.mean()).abs().argmax())
    threshold = float((table.mean("a")[layer] + table.mean()[layer]) / 2)
    overrides += ["budget=threshold", f"budget.threshold={threshold}"]
    capsys.readouterr()
    run_command("calibrate", arguments(workspace, tmp_path, *overrides))
    printed, vig = capsys.readouterr().out, json.loads((tmp_path / "vig.json").read_text())
    expected = table.mean("a").tolist()
    layers = [i for i, score in enumerate(expected) if score <= threshold]
    assert layers != [i for i, score in enumerate(table.mean().tolist()) if score <= threshold]
    assert (vig["scores"], vig["layers"], vig["task"], vig["universal"]) == (expected, layers, "a", "a")
    columns = [i for i, task in enumerate(table.tasks) if task == "a"]
    own = [table.samples[i] for i in columns]
    assert vig["records"] == SkipPlan.load(tmp_path / "plan.json").provenance["records"] == own
    rows = re.findall(r"^ +\d +(\S+) +\S+ to ", printed, re.MULTILINE)
    assert [float(score) for score in rows] == pytest.approx(expected, rel=1e-3)
    assert f"on the {len(table.samples)} samples, {len(own)} of which chose it" in printed
    seeds = json.loads((tmp_path / "seeds.json").read_text())["scores"]
    pairs = [table.values[:, list(pair)].mean(-1).tolist() for pair in combinations(columns, 2)]
    assert all(any(scores == pytest.approx(pair) for pair in pairs) for scores in seeds)
    calibration = read_calibration(tmp_path)
    assert [row["score"] for row in layer_table(calibration)["rows"]] == [f"{score:.2e}" for score in expected]
    assert layer_table(calibration)["rows"][0]["interval"] == [f"{x:.1e}" for x in table.interval("a")[0].tolist()]


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
    saving = capsys.readouterr().out.split("prefill of the decoder: ")[1].splitlines()[0]
    assert float(saving.split(" %")[0]) <= 90.0
    assert re.search(r", for \d+ text and \d+ visual tokens, the samples' mean$", saving)


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
        (["bank=true", "samples=1"], "samples: one of 'a', 'b', 'c', and one has no variance; draw 2 of every task"),
        (["transfer=true", "samples=4"], "samples: one of 'b', 'c'"),
        (
            ["transfer=true", "task=a", "samples=2"],
            "transfer: compares the plans of several tasks; all samples are of a",
        ),
        (["bank=true", "samples=2", "universal=d"], "universal: no sample has the task 'd'"),
        (["universal=a"], "universal: a is the universal plan of a bank"),
        (["bank=true", "strategy.search=greedy"], "bank: strategy.search=greedy finds one plan for all tasks"),
        (["prompts=/none.jsonl"], "prompts: /none.jsonl: cannot be read: No such file"),
        (["source=llava_665k"], "recipe: give either recipe=... or prompts=..."),
        (["source=photos"], "source: no configuration named 'photos'"),
        (["subject=llava"], "subject: no configuration named 'llava'"),
        (["subject=llava_1_5_7b"], "budget.count: 19; the model has 3 layers"),
    ],
)
def test_mistakes_are_one_line(workspace, tmp_path, overrides, message, capsys):
    with pytest.raises(SystemExit):
        run_command("calibrate", arguments(workspace, tmp_path / "x", *overrides))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "x" / "plan.json").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(workspace, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        run_command("calibrate", arguments(workspace, tmp_path / "file"))
    assert capsys.readouterr().err.splitlines()[-1] == f"error: output: {tmp_path / 'file'} is a file; name a folder"
    assert (tmp_path / "file").read_text() == "mine"


def test_data_without_any_image_are_refused(workspace, tmp_path, capsys):
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    (tmp_path / "text.yaml").write_text("sources:\n  - {name: t, path: text.json, image_root: .}\n")
    overrides = [f"recipe={tmp_path / 'text.yaml'}", "prompts=null"]
    with pytest.raises(SystemExit):
        run_command("calibrate", arguments(workspace, tmp_path / "x", *overrides))
    assert "none of the 1 records" in capsys.readouterr().err
