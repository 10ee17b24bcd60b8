"""Weights that are named and do not fit: refused by a dry run and by a start, before a tensor or a record is read."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from skipvision_train.config.resolve import load_tokenizer, model_config
from skipvision_train.errors import SkipVisionError
from skipvision_train.models import weights
from skipvision_train.models.build import meta_model
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training import run
from skipvision_train.training.run import assemble, describe_stage, open_model, run_stage

CLIP = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.0}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}


def save_clip(folder, width=32, said=None):
    """An open_clip directory; ``said`` is the width that its configuration gives in the place of the true one."""
    vision = {**CLIP, "width": width}
    folder.mkdir(exist_ok=True)
    described = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": {**vision, "width": said or width}, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    model = open_clip.CLIP(8, vision_cfg=vision, text_cfg=TEXT, quick_gelu=True)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def change(file, **tensors):
    """Put tensors into a safetensors file, or take them out (None)."""
    state = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file, metadata={"format": "pt"})


@pytest.fixture
def folder(make_cfg, tmp_path):
    """``llm`` in shards, ``clip``, and ``stage``, a finished stage at half the resolution."""
    cfg = make_cfg("model.vision.image_size=16", "model.connector.windows=[4,2,1]")
    tokenizer = load_tokenizer(cfg)
    config = model_config(cfg, tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(config.text_config).save_pretrained(tmp_path / "llm", max_shard_size="20KB")
    SkipVisionForConditionalGeneration(config).save_pretrained(tmp_path / "stage")
    for name in ("llm", "stage"):
        tokenizer.save_pretrained(tmp_path / name)
    save_clip(tmp_path / "clip")
    return tmp_path


LLM, VISION, CONNECTOR, STAGE = (
    "model.llm={0}/llm",
    "model.vision_weights={0}/clip",
    "model.connector_weights={0}/stage",
    "stage.start_from={0}/stage",
)
PARTS = (LLM, VISION, CONNECTOR)


def spoil(folder, how):
    """Make a part unfit."""
    if how == "shard":
        next(folder.glob("llm/model-00002-of-*")).unlink()
    elif how == "cut":
        file = next(folder.glob("llm/model-00002-of-*"))
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "llm":
        file = next(f for f in folder.glob("llm/*.safetensors") if "model.norm.weight" in load_file(f))
        change(file, model__norm__weight=torch.ones(48))
    elif how == "clip":
        save_clip(folder / "clip", width=64)
    elif how == "lying clip":
        save_clip(folder / "clip", width=64, said=32)
    elif how == "connector":
        change(folder / "stage" / "model.safetensors", connector__projection__weight=torch.ones(3, 5))
    elif how == "positions":
        change(folder / "stage" / "model.safetensors", vision_tower__positional_embedding=torch.ones(4, 32))
    elif how == "stage":
        change(folder / "stage" / "model.safetensors", language_model__model__norm__weight=None)


@pytest.mark.parametrize(
    ("how", "overrides", "message"),
    [
        ("shard", PARTS, r"model\.safetensors\.index\.json: lists model-00002-of-\d+\.safetensors, which is not there"),
        ("cut", PARTS, r"model-00002-of-\d+\.safetensors: damaged or truncated"),
        ("llm", PARTS, r"llm: model\.norm\.weight has shape \(48,\), the model needs \(32,\)$"),
        ("clip", PARTS, r"^model\.vision\.width: 32, but the weights of .*clip need 64$"),
        ("lying clip", PARTS, r"clip: \S+ has shape \(\d*64.*, the tower needs"),
        ("connector", PARTS, r"stage: connector\.projection\.weight gives .* the shape \(3, 5\), the connector needs"),
        ("connector", (STAGE,), r"stage: connector\.projection\.weight gives .* the shape \(3, 5\), the connector"),
        ("positions", (STAGE,), r"stage: positional_embedding: 4 rows are not one more than a square number"),
        ("stage", (STAGE,), r"stage: the stage lacks 1 of \d+ tensors, first language_model\.model\.norm\.weight"),
        (None, (LLM, VISION, "model.connector_weights=/no/such.bin"), r"^model\.connector_weights: /no/such\.bin does"),
        (None, ("model.vision_weights=/no/clip",), r"^model\.vision_weights: /no/clip does not exist$"),
        (None, (STAGE, VISION), r"^model\.vision_weights: must be null where stage\.start_from gives all weights$"),
        (None, (STAGE, "model.vision.width=64", "model.vision.heads=4"), r"^model\.vision\.width: 64, but .* with 32$"),
        (None, (STAGE, "model.connector.head_dim=8"), r"^model\.connector\.head_dim: 8, but the weights .* with 16$"),
        (None, (CONNECTOR, "model.connector.head_dim=8"), r"^model\.connector\.head_dim: 8, but .* with 16$"),
        (None, (STAGE, "model.reducer.registers=3"), None),
    ],
)  # fmt: skip
def test_unfit_weights_are_refused_before_they_are_read(make_cfg, folder, monkeypatch, how, overrides, message):
    cfg = make_cfg(*(text.format(folder) for text in overrides))
    spoil(folder, how)

    def reader(*args):
        raise AssertionError("a tensor was read")

    def records(*args):
        raise AssertionError("a record was read")

    monkeypatch.setattr(weights, "_reader", reader)
    if message is None:  # fits: also a dry run of sound weights reads none
        assert "optimizer groups" in describe_stage(cfg)
        return
    with pytest.raises(SkipVisionError, match=message) as told:
        describe_stage(cfg)
    assert "\n" not in str(told.value)
    monkeypatch.setattr(run, "open_dataset", records)
    with pytest.raises(SkipVisionError, match=message):
        run_stage(cfg)


@pytest.mark.parametrize("overrides", [PARTS, (STAGE,), ()])
def test_sound_weights_pass_and_random_ones_stay_the_same(make_cfg, folder, overrides):
    cfg = make_cfg(*(text.format(folder) for text in overrides))
    assert "optimizer groups" in describe_stage(cfg)
    config = model_config(cfg, load_tokenizer(cfg))
    torch.manual_seed(4)
    plain = open_model(cfg, config).state_dict()
    torch.manual_seed(4)
    checked = assemble(cfg).model.state_dict()
    assert all(torch.equal(tensor, checked[name]) for name, tensor in plain.items())


def test_names_of_fresh_and_unread_tensors_are_kept(make_cfg, folder, caplog):
    cfg = make_cfg(LLM.format(folder), CONNECTOR.format(folder), "trainer.max_steps=1", "trainer.save_every=0")
    with caplog.at_level("INFO"):
        run_stage(cfg)
    names = json.loads((folder / "run" / "weights.json").read_text())
    own = meta_model(model_config(cfg, load_tokenizer(cfg))).state_dict()
    assert names == {
        "missing": [name for name in own if name.startswith(("vision_tower.", "reducer."))],
        "unused": [],
    }
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("weights: "))
    assert line.startswith(f"weights: missing {len(names['missing'])} (reducer ")
    assert line.endswith(f", unused 0; their names are in {folder / 'run' / 'weights.json'}")
