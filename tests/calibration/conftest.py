"""A tiny Skip-Vision model with its processor, and a few records about images on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from PIL import Image

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration


@pytest.fixture
def own_processor(tiny_config) -> SkipVisionProcessor:
    tokenizer = byte_tokenizer()
    tiny_config.image_token_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    return SkipVisionProcessor.from_config(tiny_config, tokenizer)


@pytest.fixture
def own_model(tiny_config, own_processor) -> SkipVisionForConditionalGeneration:
    """Weights large enough that the output depends on image, question and plan."""
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def picture(tmp_path) -> Callable[[str], Path]:
    """Writes an image of noise of that name."""

    def write(name: str) -> Path:
        number = sum(name.encode())
        pixels = np.random.default_rng(number).integers(0, 256, (18, 20 + number % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def record(picture) -> Callable[..., Record]:
    """``record("question", "answer", ...)`` about one image, which the first question begins with."""

    def make(*texts: str, identity: str = "7", task: str | None = None) -> Record:
        roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
        turns = [Turn(role, text) for role, text in zip(roles, texts, strict=True)]
        turns[0] = Turn("user", f"<image>\n{texts[0]}")
        return Record(identity, "quiz", (ImageRef(picture(f"{identity}.png")),), tuple(turns), task)

    return make
