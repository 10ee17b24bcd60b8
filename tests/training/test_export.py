"""``skipvision export``: checkpoints with and without DeepSpeed's shards as model directories."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvision_train.commands.export import Config, run
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.checkpoints import CheckpointInfo, mark_complete
from skipvision_train.training.ema import averaged
from skipvision_train.training.export import read_state
from skipvision_train.training.lora import ADAPTERS
from skipvision_train.training.run import run_stage


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    """A run without DeepSpeed; a copy of its folder for each test."""
    return tmp_path_factory.mktemp("export") / "run"


@pytest.fixture
def checkpoint(trained, make_cfg, tmp_path):
    if not trained.exists():
        run_stage(make_cfg("trainer.max_steps=2", f"trainer.output_dir={trained}"))
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def test_a_checkpoint_exports_to_what_the_finished_model_is(checkpoint, trained, tmp_path):
    run(Config(str(checkpoint), str(tmp_path / "out")))
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (trained / "model").iterdir()}
    SkipVisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "option", ["stage.ema_decay=0.5", "stage.lora={rank: 3, alpha: 6, targets: [q_proj, down_proj]}"]
)
def test_the_finished_model_comes_out_again(make_cfg, tmp_path, option):
    """Of the last checkpoint, and of the model itself; adapters are no weights of it."""
    final = run_stage(make_cfg("trainer.max_steps=2", "stage.warmup_ratio=0", option))
    theirs = load_file(final / "model.safetensors")
    for source in (final.parent / "checkpoint-2", final):
        output = tmp_path / f"out-{source.name}"
        run(Config(str(source), str(output)))
        ours = load_file(output / "model.safetensors")
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert {p.name for p in output.iterdir()} == {p.name for p in final.iterdir()}
    if (final / ADAPTERS).exists():
        assert (output / ADAPTERS).read_bytes() == (final / ADAPTERS).read_bytes()


@pytest.mark.parametrize("stored", [("a", "b"), ("a",), ("b",)])
def test_the_average_reaches_a_tied_weight_under_either_name(stored):
    state = {name: torch.zeros(2).bfloat16() for name in stored} | {"frozen": torch.ones(1)}
    found = averaged(state, {"a": torch.full((2,), 3.0)}, {"b": "a"})
    assert set(found) == {*stored, "frozen"}
    assert found["frozen"] == 1
    for name in stored:
        assert found[name].dtype == torch.bfloat16
        assert found[name].data_ptr() == found[stored[0]].data_ptr()
        assert found[name].tolist() == [3.0, 3.0]


def test_bf16(checkpoint, trained, tmp_path):
    run(Config(str(checkpoint), str(tmp_path / "out"), "bf16"))
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key].bfloat16()) for key in theirs)
    with pytest.raises(CheckpointError, match="dtype fp32, but it holds bfloat16 and no fp32 masters"):
        run(Config(str(tmp_path / "out"), str(tmp_path / "again"), "fp32"))
    assert not (tmp_path / "again").exists()


def test_large_weights_are_split(checkpoint, tmp_path, monkeypatch):
    from skipvision_train.training import export

    split = export.split_torch_state_dict_into_shards
    small = partial(split, max_shard_size=50_000)
    monkeypatch.setattr(export, "split_torch_state_dict_into_shards", small)
    run(Config(str(checkpoint), str(tmp_path / "out")))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = SkipVisionForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], t) for key, t in load_file(checkpoint / "model.safetensors").items())


@pytest.mark.parametrize("damage", ["flipped bit", "no marker", "tensor missing", "output exists", "no model", "dtype"])
def test_refusals(checkpoint, tmp_path, damage):
    weights, error, message, dtype = checkpoint / "model.safetensors", CheckpointError, "", None
    if damage == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
        message = r"the content of model\.safetensors is not what was written"
    elif damage == "no marker":
        (checkpoint / "COMPLETE.json").unlink()
        message = "not complete"
    elif damage == "tensor missing":
        state = load_file(weights)
        state.pop("connector.ln_out.weight", None) or state.popitem()
        save_file(state, weights)
        mark_complete(checkpoint, CheckpointInfo(2, 1, "none"))
        message = "has shape None, the model has"
    elif damage == "output exists":
        (tmp_path / "out").mkdir()
        error, message = ConfigError, "^output: .* exists"
    elif damage == "no model":
        (checkpoint / "config.json").unlink()
        error, message = ConfigError, r"^checkpoint: .* has no config\.json"
    else:
        error, message, dtype = ConfigError, "^dtype: 'fp16' is unknown", "fp16"
    with pytest.raises(error, match=message):
        run(Config(str(checkpoint), str(tmp_path / "out"), dtype))
    assert damage == "output exists" or not (tmp_path / "out").exists()


def test_remains_of_a_former_export_are_removed(checkpoint, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old.txt").write_text("old")
    run(Config(str(checkpoint), str(tmp_path / "out")))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "old.txt").exists()


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\*\.safetensors and no shards of DeepSpeed"):
        read_state(tmp_path, None)
    with pytest.raises(CheckpointError, match="dtype fp32, but it holds no weights"):
        read_state(tmp_path, "fp32")
    save_file({"a": torch.ones(1), "b": torch.ones(1).bfloat16()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="dtype fp32, but it holds bfloat16, float32 and no fp32 masters"):
        read_state(tmp_path, "fp32")


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_masters_out_of_bf16_shards(workspace, tmp_path, engine):
    """One process: the masters rounded to bf16 are the stored weights bit for bit, and not all of them were bf16."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "skipvision_train", "train", "--config-dir", str(workspace / "conf"), "experiment=tiny",
         f"trainer.output_dir={tmp_path / 'run'}", f"deepspeed={engine}", "trainer.precision=bf16",
         "trainer.max_steps=2", "stage.lr.vision=null"],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoint-2"
    run(Config(str(checkpoint), str(tmp_path / "out"), "fp32"))
    masters, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert set(masters) == set(stored)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[key].bfloat16(), stored[key]) for key in stored)
    assert any(not torch.equal(masters[key], stored[key].float()) for key in stored)
