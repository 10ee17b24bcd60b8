"""A tiny assistant of each origin: our class, and transformers' LLaVA and Qwen2.5-VL."""

from __future__ import annotations

import pytest
import torch
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from PIL import Image
from tiny_vlms import make_family

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.inference import Assistant
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import skip_ffn

QUESTIONS = {
    "ours": ("Which colour?", "<image> or <image>?", "How many, then?"),
    "foreign": ("w1 w2 w3", "<image> w4 <image> w5 w6", "w4 w5 w6 w7"),
}
"""About one image, two, none."""


def make_ours(config) -> Assistant:
    """Weights large enough that the answer depends on image and question."""
    tokenizer = byte_tokenizer()
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.skip_plan = skip_ffn().bind(3).to_dict()
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return Assistant(model, SkipVisionProcessor.from_config(config, tokenizer))


@pytest.fixture
def ours(tiny_config):
    return make_ours(tiny_config)


@pytest.fixture(params=["ours", "llava", "qwen2_5_vl"])
def assistant(request, tiny_config):
    if request.param == "ours":
        return make_ours(tiny_config)
    family = make_family(request.param)
    return Assistant(family.model.eval(), family.processor)


@pytest.fixture
def questions(assistant):
    return QUESTIONS["ours" if assistant.is_ours else "foreign"]


@pytest.fixture
def pictures():
    return [Image.effect_mandelbrot((24, 20 + i), (-2, -1.5, 1 + i, 1.5), 30).convert("RGB") for i in range(3)]
