"""A tiny saved model, and a few questions about images on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from PIL import Image

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import skip_ffn


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def processor(tiny_config, tokenizer):
    tiny_config.image_token_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    return SkipVisionProcessor.from_config(tiny_config, tokenizer)


@pytest.fixture
def model(tiny_config, processor):
    """Under Skip-Vision's plan. Weights large enough that the answer depends on image and question, and drawn here, so
    that it says the same with every version of transformers."""
    tiny_config.skip_plan = skip_ffn().bind(3).to_dict()
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if len(parameter.unique()) > 1:  # all that is drawn; norms and most biases are constants
                scale = 0.16 if name.startswith("language_model.") else 0.02
                parameter.normal_(std=scale, generator=generator)
    return model


@pytest.fixture
def checkpoint(model, processor, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def entry(identity: str, task: str | None, image: str | list[str] | None, question: str, answer: str) -> dict:
    images = [] if image is None else [image] if isinstance(image, str) else image
    text = "<image>\n" * len(images) + question
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": images, "conversations": turns} | ({} if task is None else {"task": task})


@pytest.fixture
def data(tmp_path) -> Path:
    """A data root with a recipe of 14 questions: two tasks about single images, one about pairs, one without any."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    entries = [entry(f"c{i}", "colour", f"{i // 2}.png", f"Which colour has object {i}?", "red") for i in range(6)]
    entries += [entry(f"n{i}", "count", f"{i + 3}.png", "How many?" + "?" * i, "two") for i in range(4)]
    entries += [entry(f"p{i}", "pair", [f"{i}.png", f"{7 - i}.png"], "The same?", "no") for i in range(2)]
    entries += [entry(f"t{i}", "words", None, f"Say {i}", str(i)) for i in range(2)]
    (root / "questions.json").write_text(json.dumps(entries))
    (root / "recipe.yaml").write_text("sources:\n  - {name: tiny, path: questions.json, image_root: images}\n")
    return root


@pytest.fixture
def records(data):
    return load_records(load_recipe(data / "recipe.yaml")).read_all()
