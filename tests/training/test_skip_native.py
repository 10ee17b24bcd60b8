"""The script that compares skip-native training with V-Skip put on afterwards, its commands run in one process."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from skipvision_train import cli
from skipvision_train.plans import SkipPlan, compose, skip_ffn, vskip
from skipvision_train.training.run import assemble


@pytest.fixture
def skip_native(pytestconfig, monkeypatch):
    """The script, its commands run in this process."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import skip_native

    started = []

    def launch(words):
        started.append(words)
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0

    monkeypatch.setattr(sys, "argv", ["skipvision"])
    monkeypatch.setattr(skip_native, "launch", launch)
    skip_native.started = started
    return skip_native


def test_the_comparison_script(skip_native, workspace, make_cfg, tmp_path, capsys):
    assemble(make_cfg("model.text.num_hidden_layers=4")).model.save_pretrained(tmp_path / "start")
    shutil.copytree(workspace / "tokenizer", tmp_path / "start", dirs_exist_ok=True)
    recipe = str(workspace / "data" / "recipe.yaml")
    options = [
        *(
            "--pretrained",
            str(tmp_path / "start"),
            "--data",
            str(workspace / "data"),
            "--output",
            str(tmp_path / "out"),
        ),
        *("--experiment", "tiny", "--config-dir", str(workspace / "conf"), "--calibrate-on", recipe, "--evaluate-on"),
        *(recipe, "--steps", "4", "--samples", "3", "--limit", "6", "--widen", "0", "1", "model.tokenizer=null"),
    ]
    skip_native.main(options)
    *lines, last = capsys.readouterr().out.splitlines()
    after, fixed, widen = rows = json.loads(last)
    assert [row["case"] for row in rows] == ["after", "fixed", "widen"]
    assert [line.split()[1] for line in lines if line.startswith("| ")] == ["training", "after", "fixed", "widen"]
    assert {word.split("=")[0] for words in skip_native.started for word in words if "skip." in word} == {
        "stage.skip.count", "stage.skip.layers", "stage.skip.widen"
    }  # fmt: skip
    layers = after["layers"]
    assert len(layers) == 2
    assert layers[0] == 3  # nothing reads what visual tokens compute in the last layer
    plans = {case: SkipPlan.load(tmp_path / "out" / case / "model/plan.json") for case in ("after", "fixed", "widen")}
    assert plans["after"] == skip_ffn().bind(4)
    assert plans["fixed"] == plans["widen"] == compose([skip_ffn(), vskip(sorted(layers))]).bind(4)
    assert after["training_flops_ratio"] == 1
    # 4 steps from 0 to 2 layers: 0, 0, 1, 1; the mean of 0.5 is a quarter of what fixed saves.
    assert 1 - widen["training_flops_ratio"] == pytest.approx((1 - fixed["training_flops_ratio"]) / 4)
    assert 0 < fixed["training_flops_ratio"] < 1
    for row in rows:
        assert row["inference_flops_skip"] == after["inference_flops_skip"] < row["inference_flops_base"] < 1
        assert row["interval_base"][0] <= row["accuracy_base"] <= row["interval_base"][1]
    assert len(skip_native.started) == 3 + 1 + 6

    skip_native.started.clear()
    skip_native.main(options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows
    assert skip_native.started == []
    with pytest.raises(SystemExit, match=r"train_after was run as skipvision train .*; use another --output"):
        skip_native.main([*options, "trainer.seed=1"])
