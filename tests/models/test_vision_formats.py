"""Checkpoints of every format, written the way their libraries write them and read back."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from skipvision_train.errors import CheckpointError
from skipvision_train.models.settings import OPENAI_MEAN, VisionConfig
from skipvision_train.models.vision import (
    ClipVisionTower,
    load_vision_weights,
    read_vision_checkpoint,
    vision_facts,
)

VISION = {"layers": 3, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.5}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
HF_VISION = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 8,
}


def open_clip_model() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(8, vision_cfg=dict(VISION), text_cfg=dict(TEXT), quick_gelu=True).eval()


def write_config(folder: Path, **vision: object) -> None:
    content = {
        "model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": {**VISION, **vision}, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def write_pickles(state: dict, folder: Path, shards: int) -> None:
    """``pytorch_model*.bin`` as older transformers wrote it, with the position ids that older CLIP models had."""
    first = next(name for name in state if name.endswith("embeddings.class_embedding"))
    state = {**state, first.replace("class_embedding", "position_ids"): torch.arange(17)[None]}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = {name: f"pytorch_model-0000{i % shards + 1}-of-0000{shards}.bin" for i, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: tensor for name, tensor in state.items() if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def check_tower(tower: ClipVisionTower, model: open_clip.CLIP) -> None:
    """Compare with open_clip's own intermediate outputs."""
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.visual.forward_intermediates(
            pixels, indices=[0, 1], intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"]
        for ours, theirs in zip(tower(pixels).states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt"]
)
def test_open_clip_directory(file, tmp_path):
    model = open_clip_model()
    write_config(tmp_path)
    if file.endswith("safetensors"):
        save_file(model.state_dict(), tmp_path / file)
    else:
        torch.save(model.state_dict(), tmp_path / file)
    checkpoint = read_vision_checkpoint(tmp_path)
    assert checkpoint.facts == {
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 2.5,
        "quick_gelu": True,
        "image_mean": (0.5, 0.4, 0.3),
        "image_std": (0.1, 0.2, 0.3),
    }
    tower = ClipVisionTower(VisionConfig(**checkpoint.facts, depths=(1, 2))).eval()
    report = load_vision_weights(tower, checkpoint)
    check_tower(tower, model)
    read = {f"visual.{name}" for name in tower.state_dict()}
    unused = {name.removeprefix("visual.") for name in model.state_dict() if name not in read}
    assert report.missing == ()
    assert set(report.unused) == unused
    assert {"proj", "ln_post.weight", "transformer.resblocks.2.ln_1.weight", "token_embedding.weight"} <= unused
    assert f"unused {len(unused)}" in report.summary()
    assert "token_embedding 1" in report.summary()


def test_bare_file_with_architecture(tmp_path, monkeypatch):
    model = open_clip_model()
    config = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-quickgelu"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    checkpoint = read_vision_checkpoint(tmp_path / "epoch_3.pt", "tiny-quickgelu")
    assert checkpoint.facts["quick_gelu"] is True
    assert checkpoint.facts["image_mean"] == OPENAI_MEAN
    tower = ClipVisionTower(VisionConfig(**checkpoint.facts, depths=(1, 2))).eval()
    load_vision_weights(tower, checkpoint)
    check_tower(tower, model)
    with pytest.raises(CheckpointError, match="name its open_clip architecture"):
        read_vision_checkpoint(tmp_path / "epoch_3.pt")


def test_facts_of_named_architectures():
    facts = vision_facts("ViT-L-14-quickgelu")
    config = VisionConfig(**{**facts, "image_size": 448}, depths=(15, 22))
    assert config == VisionConfig()
    assert facts["image_size"] == 224
    assert vision_facts("ViT-L-14")["quick_gelu"] is False
    assert vision_facts("ViT-L-14-336-quickgelu") == {**facts, "image_size": 336}
    assert vision_facts("ViT-H-14")["heads"] == 16
    with pytest.raises(CheckpointError, match=r"'ViT-L-14-quikgelu'; near names: .*ViT-L-14-quickgelu"):
        vision_facts("ViT-L-14-quikgelu")
    with pytest.raises(CheckpointError, match=r"vision_cfg\.layers = \[3, 4, 6, 3\]"):
        vision_facts("RN50")
    with pytest.raises(CheckpointError, match="timm_model_name"):
        vision_facts("ViT-B-16-SigLIP")
    with pytest.raises(CheckpointError, match="open_clip knows no 'hf-hub:some/model'"):
        vision_facts("hf-hub:some/model")


def test_most_named_vision_transformers_build_under_their_facts():
    built = 0
    for name in ("ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"):
        with torch.device("meta"):
            ClipVisionTower(VisionConfig(**vision_facts(name), depths=(1,)))
        built += 1
    assert built == 6


@pytest.mark.parametrize("kind", ["vision", "projection", "clip"])
@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin"])
def test_transformers_directory(kind, form, tmp_path):
    torch.manual_seed(0)
    if kind == "clip":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        text.update({"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8})
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=HF_VISION, projection_dim=8)).eval()
        vision = model.vision_model
    else:
        model = (CLIPVisionModel if kind == "vision" else CLIPVisionModelWithProjection)(CLIPVisionConfig(**HF_VISION))
        vision = model.eval() if kind == "vision" else model.eval().vision_model
    model.save_pretrained(tmp_path, max_shard_size="5KB" if form == "sharded" else "1GB")
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        write_pickles(model.state_dict(), tmp_path, shards=3 if form == "sharded bin" else 1)
    assert bool(list(tmp_path.glob("*.index.json"))) == ("sharded" in form)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    checkpoint = read_vision_checkpoint(tmp_path)
    assert (checkpoint.facts["image_mean"], checkpoint.facts["image_std"]) == ((0.1,) * 3, (0.2,) * 3)
    assert checkpoint.facts["quick_gelu"] is True
    tower = ClipVisionTower(VisionConfig(**checkpoint.facts, depths=(0, 2))).eval()
    report = load_vision_weights(tower, checkpoint)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = vision(pixels, output_hidden_states=True).hidden_states
        for ours, depth in zip(tower(pixels).states, (0, 2), strict=True):
            torch.testing.assert_close(ours, expected[depth][:, 1:], rtol=0, atol=2e-5)
    assert {"ln_post.weight", "ln_post.bias"} < set(report.unused)
    assert ("visual_projection.weight" in report.unused) == (kind != "vision")
    assert ("text_projection.weight" in report.unused) == (kind == "clip")
    # every tensor is accounted for: taken (q, k and v become one) or reported
    extra = 1 if form.endswith("bin") else 0
    assert len(model.state_dict()) + extra == len(checkpoint.state) + 2 * 2 * 3 + len(checkpoint.other)
    assert sum(name.endswith("position_ids") for name in checkpoint.other) == extra


def test_mlp_ratio_gives_back_the_intermediate_size(tmp_path):
    width, hidden = 176, 240
    assert int(width * (hidden / width)) == hidden - 1  # why the ratio is nudged
    config = CLIPVisionConfig(**{**HF_VISION, "hidden_size": width, "intermediate_size": hidden})
    CLIPVisionModel(config).save_pretrained(tmp_path)
    checkpoint = read_vision_checkpoint(tmp_path)
    load_vision_weights(ClipVisionTower(VisionConfig(**checkpoint.facts, depths=(1,))), checkpoint)


def test_quick_gelu_is_read_from_the_transformers_config(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**HF_VISION, hidden_act="gelu")).save_pretrained(tmp_path)
    facts = read_vision_checkpoint(tmp_path).facts
    assert facts["quick_gelu"] is False
    tower = ClipVisionTower(VisionConfig(**facts, depths=(1,)))
    assert not any(isinstance(module, QuickGELU) for module in tower.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip'; use clip or clip_vision_model"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; use quick_gelu or gelu"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ({"image_size": [16, 32]}, r"image_size is \[16, 32\]; only squares"),
    ],
)
def test_other_transformers_models_are_refused(change, message, tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**HF_VISION)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_vision_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("ls_init_value", 1e-4), ("no_ln_pre", True), ("norm_kwargs", {"eps": 1e-6}), ("novel", 1)]
)
def test_open_clip_variants_that_compute_otherwise_are_refused(field, value, tmp_path):
    write_config(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=rf"vision_cfg\.{field} = "):
        read_vision_checkpoint(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing"):
        read_vision_checkpoint(tmp_path / "nothing")
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"found none of open_clip_model\.safetensors"):
        read_vision_checkpoint(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors: damaged or truncated"):
        read_vision_checkpoint(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor is named visual\."):
        read_vision_checkpoint(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json: no readable JSON"):
        read_vision_checkpoint(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"visual.conv1.weight": Payload()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt: no plain file of tensors: it holds other"):
        read_vision_checkpoint(tmp_path / "weights.pt", "ViT-B-32")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript archive:UserWarning")
def test_torchscript_archives_are_refused_with_a_hint(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_vision_checkpoint(tmp_path / "ViT-B-32.pt", "ViT-B-32")


def test_a_missing_shard_tensor_is_named(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**HF_VISION)).save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lost\.weight is listed"):
        read_vision_checkpoint(tmp_path)


def test_a_missing_key_projection_is_named(tmp_path):
    model = CLIPVisionModel(CLIPVisionConfig(**HF_VISION))
    model.save_pretrained(tmp_path)
    state = {n: t for n, t in model.state_dict().items() if n != "encoder.layers.1.self_attn.k_proj.bias"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        read_vision_checkpoint(tmp_path)
