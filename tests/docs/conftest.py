"""A folder as the documents assume it: a small trained model, a plan, photos, questions, records."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from PIL import Image
from transformers import LlamaConfig

from skipvision_train import cli
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig
from skipvision_train.plans import skip_ffn
from skipvision_train.sketches.settings import DataSize, LanguageSize, SketchSettings, VisionSize
from skipvision_train.sketches.writer import write_sketches

DEPTH = 4
MODELS = (
    "outputs/sv_cos/model",
    "outputs/demo/sft/model",
    "outputs/sketches_sft/model",
    "outputs/my_sft/model",
    "outputs/demo/pretrain/model",
)
DONE = (
    ("calibrate", "recipe=sketches:sft", "samples=2", "output=outputs/demo/calibration"),
    ("evaluate", "recipe=sketches:heldout", "limit=1", "max_new_tokens=3", "output=outputs/demo/evaluation"),
    ("analyze", "recipe=sketches:heldout", "samples=1", "parts=[ffn]", "output=outputs/analysis"),
)
"""Commands whose results the documents go on with."""


def save_model(folder: Path) -> None:
    """A model of 4 layers, with the demo's tower and resampler, under Skip-Vision's plan, and its processor."""
    tokenizer = byte_tokenizer()
    text = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    vision = VisionConfig(image_size=96, patch_size=16, width=128, layers=3, heads=4, depths=(2, 3))
    config = SkipVisionConfig(
        text_config=text,
        vision=vision,
        connector=ResamplerConfig(windows=(6, 2, 1), queries=(4, 9, 36), head_dim=32),
        reducer=ReducerConfig(local_keep=18),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        skip_plan=skip_ffn().bind(DEPTH).to_dict(),
    )
    torch.manual_seed(0)
    SkipVisionForConditionalGeneration(config).save_pretrained(folder)
    SkipVisionProcessor.from_config(config, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory) -> Path:
    """The folder; tests work on copies."""
    root = tmp_path_factory.mktemp("furnished")
    save_model(root / MODELS[0])
    for other in MODELS[1:]:
        shutil.copytree(root / MODELS[0], root / other)
        (root / other).with_name("metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    shutil.copy(root / MODELS[-1] / "../metrics.jsonl", root / MODELS[0] / "../metrics.jsonl")
    small = SketchSettings(
        DataSize(pretrain=28, sft=28, heldout=28, seed=11),
        LanguageSize(width=32, layers=2, heads=4, key_value_heads=2, ffn=48),
        VisionSize(image_size=24, patch_size=12, width=32, layers=2, head_width=16),
    )
    write_sketches(root / "outputs/demo/data", small, processes=1)
    shutil.copytree(root / "outputs/demo/data", root / "outputs/sketches")
    images = root / "data/mine/images"
    images.mkdir(parents=True)
    for place in (root / "photo.jpg", root / "a.jpg", root / "b.jpg", *(images / f"{i}.jpg" for i in range(4))):
        pixels = np.random.default_rng(len(place.name)).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A lamp."}]
    records = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(4)]
    (root / "data/mine/mine.json").write_text(json.dumps(records))
    (root / "my_recipe.yaml").write_text("sources:\n  - {name: mine, path: mine.json, image_root: images}\n")
    prompts = [{"image": name, "prompt": "What is on the table?"} for name in ("a.jpg", "b.jpg")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["skipvision"])
        for name, *words in DONE:
            with pytest.raises(SystemExit, match="0"):
                cli.main([name, f"checkpoint={MODELS[0]}", "data_root=outputs/demo/data", *words])
    shutil.copytree(root / "outputs/demo/calibration", root / "outputs/calibration")
    return root


@pytest.fixture
def folder(furnished, tmp_path, monkeypatch) -> Path:
    """A copy of the furnished folder, which is the current one."""
    place = tmp_path / "work"
    shutil.copytree(furnished, place)
    monkeypatch.chdir(place)
    return place
