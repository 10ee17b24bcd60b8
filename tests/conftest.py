"""Tiny random models shared by the tests: real transformers and open_clip classes, fp32, no network."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig

from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.settings import ReducerConfig, VisionConfig

torch.set_num_threads(1)
settings.register_profile("no clock", deadline=None)  # how long an example takes says nothing on a machine in use
settings.load_profile("no clock")


def make_text_config(num_hidden_layers: int = 3, vocab_size: int = 320) -> LlamaConfig:
    """A LLaMA with grouped-query attention: 4 heads, 2 key-value heads, width 32."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        attn_implementation="sdpa",
    )


def make_config(**overrides: object) -> SkipVisionConfig:
    """Grid 8; levels of 1, 4 and 16 windows with 2, 4 and 16 queries; 16 local tokens merged to 6, both summaries."""
    values: dict = {
        "text_config": make_text_config(),
        "vision": VisionConfig(
            image_size=32, patch_size=4, width=32, layers=3, heads=2, mlp_ratio=2.0, quick_gelu=True, depths=(1, 2)
        ),
        "connector": ResamplerConfig(windows=(8, 4, 2), queries=(2, 4, 16), head_dim=16),
        "reducer": ReducerConfig(local_keep=6),
        "image_token_id": 3,
    }
    values.update(overrides)
    return SkipVisionConfig(**values)


@pytest.fixture
def tiny_text_config() -> LlamaConfig:
    return make_text_config()


@pytest.fixture
def tiny_config() -> SkipVisionConfig:
    return make_config()


@pytest.fixture
def config_factory() -> Callable[..., SkipVisionConfig]:
    """``make_config`` for tests that vary it."""
    return make_config


@pytest.fixture
def text_config_factory() -> Callable[..., LlamaConfig]:
    """``make_text_config`` for tests that vary it."""
    return make_text_config
