"""``--dry-run``: the paper's setting without weights, data or GPU, and one sample where there is data."""

from __future__ import annotations

import re
import sys

import pytest

from skipvision_train import cli
from skipvision_train.config.resolve import stage_plan
from skipvision_train.config.specs import DeepSpeedSpec
from skipvision_train.errors import ConfigError
from skipvision_train.plans import TokenKind, dense, fastv, skip_ffn, victor, vskip
from skipvision_train.training.dryrun import amount, mark_sample
from skipvision_train.training.memory import estimate_memory
from skipvision_train.training.run import describe_stage


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *arguments, "--dry-run"])
        assert stopped.value.code == 0
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().out

    return run


def test_sv_cos(dry_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    out = dry_run("experiment=sv_cos")
    assert "272 retained, 256 local (the last one runs the FFN), 2 summary" in out
    assert "8 samples x 8 processes x 2 accumulated = 128 per step" in out
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"^  (\w+) +([\d,]+) parameters, ", out, re.M)}
    assert counts["llm"] == 8_030_261_248  # LLaMA-3-8B as published
    assert counts["all"] == sum(counts.values()) - counts["all"]
    assert f"{counts['all']:,} parameters, {counts['all']:,} of them train" in out
    for part in ("vision", "connector", "reducer", "llm"):
        assert re.search(rf"^  {part} +lr 1e-05, weight decay 0, \d+ tensors, {counts[part]:,} parameters$", out, re.M)
    # 128 text and 1,296 visual tokens by hand: 32 layers of n (4 C^2 + 4 C K + 6 C M) + 4 n^2 C, K = 1024.
    n, c, m, k = 1424, 4096, 14336, 1024
    dense = 32 * (n * (4 * c * c + 4 * c * k + 6 * c * m) + 4 * n * n * c)
    assert f"all 1296 visual tokens dense: {dense / 1e12:.3f} TFLOPs" in out
    n, ffn = 128 + 530, 128 + 275
    skipped = 32 * (n * (4 * c * c + 4 * c * k) + 4 * n * n * c + ffn * 6 * c * m)
    assert f"this stage: {skipped / 1e12:.3f} TFLOPs ({100 * skipped / dense:.1f} %)" in out
    # ZeRO-3 under bf16: 16 bytes per parameter over 8 processes.
    assert f"= {counts['all'] * 16 / 8 / 1e9:.3f} GB per process" in out
    assert "layer    0-31: no FFN for skipped" in out
    assert "none: no tokenizer" in out


def test_cos_pretrain(dry_run):
    out = dry_run("experiment=cos_pretrain")
    assert "80 retained" in out
    assert out.count("frozen") == 3
    assert re.search(r"^  connector +lr 0\.001, ", out, re.M)


def test_registers_have_a_place_of_their_own(make_cfg):
    assert "6 retained, 6 local (the last one runs the FFN), 2 summary, 4 registers" in describe_stage(
        make_cfg("model.reducer.registers=4")
    )
    off = "{registers: 4, split: none, local_keep: null, summary: none, last_local_ffn: false}"
    out = describe_stage(make_cfg("plan.method=dense", f"model.reducer={off}"))
    assert "22 retained, 4 registers" in out
    assert "<26 visual tokens: 22 retained, 4 summary>" in out
    assert re.search(r"^  reducer +128 parameters, ", out, re.M)


def test_a_plan_file_may_fit_several_depths(make_cfg, tmp_path):
    def plan(*overrides):
        return stage_plan(make_cfg(*overrides), 5)

    def of_file(name):
        return plan("plan.method=file", f"plan.path={tmp_path / name}")

    fastv(1).save(tmp_path / "fastv.json")
    assert of_file("fastv.json") == fastv(1).bind(5)
    assert plan("plan.method=dense") == dense().bind(5)
    assert plan("plan.method=skip_ffn") == skip_ffn().bind(5)
    assert plan("plan.method=fastv", "plan.layer=2", "plan.keep=0.25") == fastv(2, 0.25).bind(5)
    vskip([5]).save(tmp_path / "deep.json")
    with pytest.raises(ConfigError, match=r"^plan: vskip: layers \[5\] do not exist; .*0 to 4"):
        of_file("deep.json")
    skip_ffn().bind(4).save(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"^plan: plan 'skip_ffn' has 4 layers, the model has 5"):
        of_file("other.json")
    with pytest.raises(ConfigError, match=r"^plan\.method: 'own' is a checkpoint's plan, and here is none"):
        plan("plan.method=own")


def test_a_plan_that_needs_registers(make_cfg, tmp_path):
    victor(1, 8).bind(2).save(tmp_path / "victor.json")
    cfg = make_cfg("plan.method=file", f"plan.path={tmp_path / 'victor.json'}", "model.reducer.registers=4")
    with pytest.raises(ConfigError, match=r"^model\.reducer\.registers: 4, but plan 'victor' needs 8"):
        describe_stage(cfg)


def test_one_sample(make_cfg):
    out = describe_stage(make_cfg())
    assert "2 samples x 1 processes x 2 accumulated = 4 per step; 4 steps over 12 samples" in out
    assert "<|start_header_id|>user<|end_header_id|>" in out
    assert "<14 visual tokens: 3 retained, 4 middle, 2 summary, 5 skipped>" in out
    assert "[[red<|eot_id|>]]" in out
    assert "4 supervised (in [[ ]])" in out


def test_missing_data_is_no_error(make_cfg, tmp_path):
    out = describe_stage(make_cfg(f"data.recipe={tmp_path / 'none.yaml'}"))
    assert "none: " in out
    assert "steps over unknown samples" in out


def test_mistakes_are_found(make_cfg):
    with pytest.raises(ConfigError, match=r"^trainer\.global_batch"):
        describe_stage(make_cfg("trainer.global_batch=5"))


def test_marking():
    text, kept, left = TokenKind.TEXT, TokenKind.RETAINED, TokenKind.SKIPPED
    lines = mark_sample(
        ["a", "i", "i", "i", "i", "b", "c", "d"],
        [text, kept, kept, left, left, text, text, text],
        [False, False, False, False, False, False, True, False],
        [False, True, True, True, True, False, False, False],
    )
    assert lines == ["a<4 visual tokens: 2 retained, 2 skipped>b[[c]]d", "8 tokens, 1 supervised (in [[ ]])"]


@pytest.mark.parametrize(
    ("value", "text"), [(6.5371e12, "6.537 TB"), (1e12, "1.000 TB"), (4.2e11, "420.000 GB"), (5e3, "0.005 MB")]
)
def test_amount(value, text):
    assert amount(value, "B") == text


@pytest.mark.parametrize(
    ("precision", "stage", "weights", "gradients", "optimizer"),
    [
        ("fp32", None, 4 * 100, 4 * 60, 8 * 60),
        ("bf16", None, 4 * 100, 4 * 60, 8 * 60),
        ("bf16", 1, 2 * 100, 2 * 60, 12 * 60 / 4),
        ("bf16", 2, 2 * 100, 2 * 60 / 4, 12 * 60 / 4),
        ("bf16", 3, 2 * 100 / 4, 2 * 60 / 4, 12 * 60 / 4),
        ("fp32", 3, 4 * 100 / 4, 4 * 60 / 4, 8 * 60 / 4),
    ],
)
def test_memory(precision, stage, weights, gradients, optimizer):
    found = estimate_memory(100, 60, precision, None if stage is None else DeepSpeedSpec(stage=stage), 4)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.total == weights + gradients + optimizer
