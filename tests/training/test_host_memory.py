"""Weights loaded in the type that the engine gives them: which stages do, and that nothing else changes by it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launched import two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skipvision_train.config.resolve import load_tokenizer, model_config
from skipvision_train.config.specs import LoraSpec
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training import run
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.export import masters
from skipvision_train.training.lora import add_adapters
from skipvision_train.training.memory import weights_dtype

ZERO2 = ("deepspeed.stage=2", "trainer.precision=bf16")
ZERO3 = ("deepspeed.stage=3", "deepspeed.persistence_threshold=0", "trainer.precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (ZERO2, torch.bfloat16),
        (ZERO3, torch.bfloat16),
        ((*ZERO2, "stage.lora.rank=2"), torch.bfloat16),
        (("trainer.precision=bf16",), torch.float32),  # autocast: weights stay fp32
        (("deepspeed.stage=2",), torch.float32),
        ((*ZERO2, "stage.lora.quantize=nf4"), torch.float32),  # quantised before there is an engine
    ],
)
def test_only_what_an_engine_casts_is_loaded_in_bf16(make_cfg, overrides, expected):
    assert weights_dtype(make_cfg(*overrides)) == expected


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A sharded bf16 decoder, and a stage at half the resolution without a reducer, as a run leaves it."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def from_parts(make_cfg, parts):
    """Overrides of a stage that starts from a language model's directory."""
    cfg = make_cfg()
    if not (parts / "llm").exists():
        torch.manual_seed(5)
        text = model_config(cfg, load_tokenizer(cfg)).text_config
        AutoModelForCausalLM.from_config(text).to(torch.bfloat16).save_pretrained(parts / "llm", max_shard_size="20KB")
    return (f"model.llm={parts / 'llm'}",)


@pytest.fixture
def grown(make_cfg, parts):
    """Overrides of a stage that starts from a smaller one: the resampler scaled, positions interpolated."""
    cfg = make_cfg("model.vision.image_size=16", "model.connector.windows=[4,2,1]")
    if not (parts / "stage").exists():
        torch.manual_seed(6)
        tokenizer = load_tokenizer(cfg)
        model = SkipVisionForConditionalGeneration(model_config(cfg, tokenizer)).to(torch.bfloat16)
        model.save_pretrained(parts / "stage", max_shard_size="20KB")
        tokenizer.save_pretrained(parts / "stage")
    return (f"stage.start_from={parts / 'stage'}",)


def train(cfg, how, folder):
    """Two processes by torchrun; returns the types that the weights were loaded in."""
    done = two_processes("loaded_stage.py", cfg, how, folder)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("types-*.json"))]
    assert len(found) == 2
    return {kind for kinds in found for kind in kinds}


def check_same_files(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_losses_weights_and_masters_are_those_of_weights_loaded_in_fp32(make_cfg, tmp_path, from_parts, grown, case):
    """ZeRO-2: a grown stage, its tower frozen, with a moving average, resumed. ZeRO-3: from parts, all of it trains."""
    chosen = {
        "zero2": (*ZERO2, *grown, "stage.lr.vision=null", "stage.ema_decay=0.75"),
        "zero3": (*ZERO3, *from_parts),
    }[case]
    runs = {}
    for how in ("usual", "fp32"):
        folder = tmp_path / how
        folder.mkdir()
        cfg = make_cfg(*chosen, "trainer.per_device_batch=1", f"trainer.output_dir={folder / 'run'}")
        expected = {"usual": {"torch.bfloat16"}, "fp32": {"torch.float32"}}[how]
        assert train(cfg, how, folder) == expected
        runs[how] = folder / "run"
    ours, theirs = runs["usual"], runs["fp32"]
    losses = [[row["loss"] for row in read_metrics(each / "metrics.jsonl")] for each in (ours, theirs)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    names = ["model/model.safetensors", "checkpoint-4/model.safetensors"]
    names += ["checkpoint-4/average.safetensors"] if case == "zero2" else []
    for name in names:
        check_same_files(load_file(ours / name), load_file(theirs / name))
    check_same_files(masters(ours / "checkpoint-4"), masters(theirs / "checkpoint-4"))
    sizes = [{f.name: f.stat().st_size for f in (each / "checkpoint-4").rglob("*.pt")} for each in (ours, theirs)]
    assert sizes[0].keys() == sizes[1].keys()
    assert all(abs(size - sizes[1][name]) < 5000 for name, size in sizes[0].items())  # no file came along with a view

    if case == "zero2":  # as after a crash while the last checkpoint was written
        first = load_file(ours / "model" / "model.safetensors")
        shutil.rmtree(ours / "model")
        (ours / "checkpoint-4" / "COMPLETE.json").unlink()
        cfg = make_cfg(*chosen, "trainer.per_device_batch=1", f"trainer.output_dir={ours}")
        assert train(cfg, "usual", tmp_path / "usual") == {"torch.bfloat16"}
        check_same_files(load_file(ours / "model" / "model.safetensors"), first)


def test_adapters_begin_as_on_fp32_weights(make_cfg, from_parts, monkeypatch):
    """peft draws them in fp32 and gives them the type of the weights beneath."""
    states = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(run, "weights_dtype", lambda cfg, dtype=dtype: dtype)
        cfg = make_cfg(*from_parts)
        torch.manual_seed(7)
        model = run.open_model(cfg, model_config(cfg, load_tokenizer(cfg)))
        add_adapters(model, LoraSpec(rank=3, alpha=6, targets=["q_proj", "down_proj"]))
        states.append({name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()})
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert any("lora_A" in name for name in states[0])
    check_same_files(*states)
