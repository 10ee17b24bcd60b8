"""Training under a plan that skips layers from the first step on, or more and more of them."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from interrupted import InterruptAfter, InterruptionError
from safetensors.torch import load_file
from transformers import TrainerCallback

from skipvision_train.config.resolve import model_config
from skipvision_train.config.validate import validate
from skipvision_train.errors import ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import SkipPlan, TokenKind, compose, fastv, skip_ffn, vskip, vtw
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.run import describe_stage, run_stage

VISUAL = {TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED}
DEEP = "model.text.num_hidden_layers=4"
ORDER = "stage.skip.layers=[3,0,2]"
# Three layers over 4.8 of 6 steps: one more every 1.6 steps.
WIDEN = (DEEP, ORDER, "stage.skip.widen=[0,0.8]", "trainer.max_steps=6", "trainer.save_every=2")
EXPECTED = [0, 0, 1, 1, 2, 3]


def schedule_of(layers: int, widen: tuple[float, float] | None) -> PlanSchedule:
    return PlanSchedule(tuple(vskip(range(k)).bind(layers) for k in range(layers + 1)), widen)


def metrics(cfg):
    return read_metrics(Path(cfg.trainer.output_dir) / "metrics.jsonl")


def losses(cfg):
    return [row["loss"] for row in metrics(cfg)]


def weights(model):
    return load_file(Path(model) / "model.safetensors")


def same_weights(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Watch(TrainerCallback):
    """Note for every micro batch of every step under which plan the decoder's layers ran."""

    def __init__(self) -> None:
        self.skipped: list[set[tuple[int, ...]]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        decoder = model.language_model.model
        decoder.layers[0].register_forward_pre_hook(lambda *_: self.note(decoder))

    def on_step_begin(self, args, state, control, **kwargs):
        self.skipped.append(set())

    def note(self, decoder):
        self.skipped[-1].add(decoder._skip_plan.layers_without_attention())


shares = st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda pair: pair[0] < pair[1])


@given(layers=st.integers(1, 12), widen=shares, total=st.integers(1, 400))
def test_layers_begin_to_skip_one_after_the_other(layers, widen, total):
    schedule = schedule_of(layers, (widen[0] / 100, widen[1] / 100))
    start, end = (Fraction(share * total, 100) for share in widen)
    counts = [schedule.skipped(step, total) for step in range(total + 1)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[total] == layers
    for step, count in enumerate(counts):
        assert schedule.plan_at(step, total).layers_without_attention() == tuple(range(count))
        if step <= start:
            assert count == 0
        if step >= end:
            assert count == layers
        else:
            assert count == max(0, math.floor(layers * (step - start) / (end - start)))
    # The rest is bookkeeping over these counts.
    assert schedule.first_steps(total) == tuple(
        next(i for i, count in enumerate(counts) if count >= k) for k in range(layers + 1)
    )
    cost = {plan: float(3 + i * i) for i, plan in enumerate(schedule.plans)}
    assert schedule.mean(cost.__getitem__, total) == pytest.approx(sum(3 + c * c for c in counts[:-1]) / total)


@given(layers=st.integers(0, 5), total=st.integers(1, 9))
def test_without_widening_all_layers_skip_throughout(layers, total):
    schedule = PlanSchedule(tuple(vskip(range(k)).bind(5) for k in range(layers + 1)))
    assert {schedule.plan_at(step, total) for step in range(total + 1)} == {vskip(range(layers)).bind(5)}
    assert schedule.first_steps(total)[-1] == 0


@pytest.mark.parametrize(
    ("part", "attention", "ffn", "bypass"),
    [("attention", True, False, "norm"), ("ffn", False, True, "zero"), ("both", True, True, "norm")],
)
def test_the_plans_skip_the_layers_in_their_order(make_cfg, part, attention, ffn, bypass):
    cfg = make_cfg(DEEP, ORDER, f"stage.skip.part={part}", f"stage.skip.bypass={bypass}")
    plans = PlanSchedule.of(cfg, 4).plans
    assert plans[0] == skip_ffn().bind(4)
    for plan, chosen in zip(plans, ([], [3], [0, 3], [0, 2, 3]), strict=True):
        assert plan.evict == {TokenKind.SKIPPED}
        for layer, rule in enumerate(plan.rules):
            assert rule.no_attention == (VISUAL if layer in chosen and attention else set())
            assert rule.no_ffn == (VISUAL if layer in chosen and ffn else {TokenKind.SKIPPED})
            assert rule.bypass == (bypass if layer in chosen and attention else "zero")


def test_a_count_means_the_deepest_and_a_dense_base_has_no_name(make_cfg):
    cfg = make_cfg(DEEP, "stage.skip.count=2", "plan.method=dense")
    plans = PlanSchedule.of(cfg, 4).plans
    assert [plan.layers_without_attention() for plan in plans] == [(), (3,), (2, 3)]
    assert [plan.name for plan in plans] == ["dense", "vskip", "vskip"]
    assert PlanSchedule.of(make_cfg(DEEP), 4).plans == (skip_ffn().bind(4),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["layers=[1,4]"], r"^stage\.skip\.layers: \[4\] do not exist; the model has layers 0 to 3$"),
        (["layers=[1,-1]"], r"^stage\.skip\.layers: -1 is out of range; use 0 or more$"),
        (["layers=[1,2,1]"], r"^stage\.skip\.layers: \[1, 2, 1\] name a layer twice$"),
        (["layers=[]"], r"^stage\.skip\.layers: \[\] names no layer"),
        (["count=5"], r"^stage\.skip\.count: 5; the model has 4 layers, use 1 to 4$"),
        (["count=0"], r"^stage\.skip\.count: 0 is out of range; use 1 or more$"),
        (["count=1", "layers=[1]"], r"^stage\.skip\.layers: \[1\] with stage\.skip\.count 1; give one of them$"),
        (["widen=[0,1]"], r"^stage\.skip: names no layers; give stage\.skip\.layers=\[\.\.\.\] or stage\.skip\.count"),
        (["count=1", "widen=[0.5,0.5]"], r"^stage\.skip\.widen: \[0\.5, 0\.5\]; .*0 <= start < end <= 1$"),
        (["count=1", "widen=[0.8,0.1]"], r"^stage\.skip\.widen: \[0\.8, 0\.1\]; "),
        (["count=1", "widen=[0,1.1]"], r"^stage\.skip\.widen: \[0\.0, 1\.1\]; "),
        (["count=1", "widen=[0.5]"], r"^stage\.skip\.widen: \[0\.5\]; use \[start, end\]"),
        (["count=1", "part=mlp"], r"^stage\.skip\.part: 'mlp' is unknown; use attention, ffn, both$"),
        (["count=1", "bypass=one"], r"^stage\.skip\.bypass: 'one' is unknown; use zero, norm$"),
        (["count=1", "part=ffn", "bypass=norm"], r"^stage\.skip\.bypass: norm replaces an attention; .*=ffn skips"),
    ],
)
def test_mistakes(make_cfg, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(make_cfg(DEEP, *(f"stage.skip.{change}" for change in changes)), 1)


def test_mistakes_that_show_with_the_checkpoint_at_hand(make_cfg, tmp_path):
    """The depth is the checkpoint's own, whatever ``model.text`` says."""
    model_config(make_cfg(DEEP), None).save_pretrained(tmp_path / "four")
    start = f"stage.start_from={tmp_path / 'four'}"
    cfg = make_cfg(start, "stage.skip.count=5")
    validate(cfg, 1)
    with pytest.raises(ConfigError, match=r"^stage\.skip\.count: 5; the model has 4 layers"):
        model_config(cfg, None)
    vskip([3]).bind(4).save(tmp_path / "plan.json")
    cfg = make_cfg(start, "stage.skip.layers=[1]", "plan.method=file", f"plan.path={tmp_path / 'plan.json'}")
    validate(cfg, 1)
    assert model_config(cfg, None).plan_or_dense().layers_without_attention() == (1, 3)


@pytest.mark.parametrize(
    ("base", "reason"),
    [(vskip([3], bypass="norm"), "bypass: 'norm' and 'zero' cannot both hold"), (vtw(2), r"have left the sequence")],
)
def test_a_base_plan_that_contradicts(make_cfg, tmp_path, base, reason):
    base.bind(4).save(tmp_path / "plan.json")
    cfg = make_cfg(DEEP, "stage.skip.layers=[3]", "plan.method=file", f"plan.path={tmp_path / 'plan.json'}")
    with pytest.raises(ConfigError, match=rf"^stage\.skip: beside plan {base.name}: .*{reason}"):
        model_config(cfg, None)


def test_a_base_plan_with_drops(make_cfg, tmp_path):
    fastv(1).save(tmp_path / "fastv.json")
    cfg = make_cfg(DEEP, "stage.skip.layers=[3]", "plan.method=file", f"plan.path={tmp_path / 'fastv.json'}")
    assert model_config(cfg, None).plan_or_dense() == compose([fastv(1), vskip([3])]).bind(4)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_widening(make_cfg, tmp_path, checkpointing):
    """Logged is what ran, in both micro batches and in the recomputation; what is stored is what comes next."""
    cfg, watch = (
        make_cfg(*WIDEN, f"trainer.gradient_checkpointing={checkpointing}", "trainer.keep_checkpoints=0"),
        Watch(),
    )
    final = run_stage(cfg, (watch,))
    assert [row["skip/layers"] for row in metrics(cfg)] == EXPECTED
    nested, run = [(), (3,), (0, 3), (0, 2, 3)], tmp_path / "run"
    assert watch.skipped == [{nested[count]} for count in EXPECTED]
    for folder, layers in ((final, 3), (run / "checkpoint-2", 1), (run / "checkpoint-4", 2), (run / "checkpoint-6", 3)):
        stored = SkipPlan.load(folder / "plan.json")
        assert stored == compose([skip_ffn(), vskip(nested[layers])]).bind(4)
        assert SkipVisionForConditionalGeneration.from_pretrained(folder).plan == stored


def test_the_final_plan_is_stored_even_where_no_step_ran_under_it(make_cfg):
    cfg = make_cfg("stage.skip.count=2", "stage.skip.widen=[0,1]", "trainer.max_steps=2", "trainer.save_every=0")
    assert SkipPlan.load(run_stage(cfg) / "plan.json").layers_without_attention() == (0, 1)
    assert [row["skip/layers"] for row in metrics(cfg)] == [0, 1]


@pytest.mark.parametrize("interrupted", [3, 5])
def test_resumed_equals_uninterrupted(make_cfg, tmp_path, interrupted):
    whole = make_cfg(f"trainer.output_dir={tmp_path / 'whole'}", *WIDEN)
    run_stage(whole)
    cfg, watch = make_cfg(*WIDEN), Watch()
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(interrupted),))
    run_stage(cfg, (watch,))
    assert [len(*plans) for plans in watch.skipped] == EXPECTED[interrupted - 1 :]
    assert [row["skip/layers"] for row in metrics(cfg)] == EXPECTED
    assert losses(cfg) == losses(whole)
    assert same_weights(tmp_path / "run/model", tmp_path / "whole/model")


@pytest.mark.parametrize("bypass", ["zero", "norm"])
def test_a_fixed_plan_is_that_plan_stored(make_cfg, tmp_path, bypass):
    short = (DEEP, "trainer.max_steps=2", "trainer.save_every=0")
    fixed = make_cfg(*short, "stage.skip.layers=[2,1]", f"stage.skip.bypass={bypass}")
    run_stage(fixed)
    compose([skip_ffn(), vskip([1, 2], bypass)]).save(tmp_path / "plan.json")
    other = ["plan.method=file", f"plan.path={tmp_path / 'plan.json'}", f"trainer.output_dir={tmp_path / 'stored'}"]
    stored, base = make_cfg(*short, *other), make_cfg(*short, f"trainer.output_dir={tmp_path / 'base'}")
    run_stage(stored)
    run_stage(base)
    assert losses(fixed) == losses(stored) != losses(base)
    assert same_weights(tmp_path / "run/model", tmp_path / "stored/model")
    assert [row.get("skip/layers") for row in metrics(fixed) + metrics(stored)] == [2, 2, None, None]


def test_a_run_from_before_the_field_existed_goes_on(make_cfg, tmp_path):
    cfg = make_cfg("trainer.max_steps=2", "trainer.save_every=1")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(1),))
    recorded = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(recorded.read_text())
    del values["stage"]["skip"]
    recorded.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"another configuration: stage\.skip\.count \(None before, 1 now\)"):
        run_stage(make_cfg("trainer.max_steps=2", "trainer.save_every=1", "stage.skip.count=1"))
    run_stage(cfg)
    assert [row["step"] for row in metrics(cfg)] == [1, 2]


def test_dry_run(make_cfg):
    fixed = describe_stage(make_cfg(DEEP, ORDER))
    assert "layer     2-3: no attention query for retained, skipped, middle (bypass zero); no FFN for skipped" in fixed
    assert "stage.skip: attention for visual tokens in layers 3, 0, 2 from the first step on" in fixed
    out = describe_stage(make_cfg(*WIDEN))
    assert "in layers 3, 0, 2, one after the other from 0 to 0.8 of the steps" in out
    assert "layers skipped: 0 from step 0, 1 from step 2, 2 from step 4, 3 from step 5, of 6 steps" in out
    # 128 text and 14 visual tokens, 5 of which skip the FFN, by hand: C = 32, K = 16, M = 48; a layer without visual
    # queries has 128 + 2 of them (two summary tokens ask).
    n, c, k, m, asking = 142, 32, 16, 48, 130
    layer = n * (4 * c * c + 4 * c * k) + 4 * n * n * c + (n - 5) * 6 * c * m
    saved = (n - asking) * (4 * c * c + 4 * n * c)
    costs = {name: (4 * layer - count * saved) / 1e6 for name, count in (("start", 0), ("end", 3), ("mean", 7 / 6))}
    for when, name in (("at the start", "start"), ("at the end", "end"), ("mean of the stage", "mean")):
        assert f"decoder, {when}: {costs[name]:.3f} MFLOPs" in out
    assert f"decoder, this stage: {costs['end']:.3f} MFLOPs" in fixed


def test_dry_run_without_data(make_cfg, tmp_path):
    epochs = ["trainer.max_steps=null", "trainer.epochs=1", f"data.recipe={tmp_path / 'none.yaml'}"]
    out = describe_stage(make_cfg(*WIDEN[:-2], *epochs))
    assert "one after the other from" in out
    assert "layers skipped:" not in out
    assert "mean of the stage" not in out


ZERO3 = ("deepspeed=zero3", "deepspeed.persistence_threshold=0")


def only_images(workspace, folder):
    """The override for a recipe of the fixture's records that have an image, two of them twice."""
    records = [r for r in json.loads((workspace / "data" / "data.json").read_text()) if "image" in r]
    (folder / "data.json").write_text(json.dumps(records + records[:2]))
    source = {"name": "tiny", "path": "data.json", "image_root": str(workspace / "data" / "images")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    return f"data.recipe={folder / 'recipe.yaml'}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "mixed"),
    [((), True), (ZERO3, False), (ZERO3, True)],
    ids=["plain", "zero3", "zero3-mixed"],
)
def test_two_processes_under_torchrun(workspace, make_cfg, tmp_path, engine, mixed):
    """As one process without DeepSpeed: every rank changes the plan at the same step, whatever wraps the model."""
    changes = [*WIDEN, "trainer.per_device_batch=1", *(() if mixed else [only_images(workspace, tmp_path)])]
    reference = make_cfg(*changes, f"trainer.output_dir={tmp_path / 'one'}")
    run_stage(reference)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2", "MASTER_PORT": str(port)}
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    done = subprocess.run(
        [str(script), "--config-dir", str(workspace / "conf"), "experiment=tiny",
         f"trainer.output_dir={tmp_path / 'two'}", *changes, *engine],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["skip/layers"] for row in rows] == EXPECTED
    assert [row["loss"] for row in rows] == pytest.approx(losses(reference), rel=1e-6)
    ours, theirs = weights(tmp_path / "two/model"), weights(tmp_path / "one/model")
    for key, value in theirs.items():  # the bounds of test_distributed.py
        torch.testing.assert_close(ours[key], value, rtol=0, atol=3e-6, msg=key)
    assert SkipPlan.load(tmp_path / "two/model/plan.json").layers_without_attention() == (0, 2, 3)
