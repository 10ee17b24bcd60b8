"""Tiny models, hand-made layouts, and the slow reference of ``tests/support``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from slow_plans import slow_logits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skipvision_train.plans import SkipPlan, TokenKind, TokenLayout

T, R, S, Y, PAD = TokenKind.TEXT, TokenKind.RETAINED, TokenKind.SKIPPED, TokenKind.SUMMARY, TokenKind.PAD
LETTERS = {"t": T, "r": R, "s": S, "y": Y, ".": PAD}


def make_model(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Three layers, grouped-query attention, weights large enough that every sublayer matters."""
    values: dict = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        "attention_bias": True,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **overrides})).eval()
    for name, parameter in model.named_parameters():  # biases and norms at 0 and 1 would hide mistakes
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def layout_of(*rows: str, documents: list[list[int]] | None = None) -> TokenLayout:
    """A layout from letters: t text, r retained, s skipped, y summary, . padding."""
    kinds = torch.tensor([[int(LETTERS[letter]) for letter in row] for row in rows])
    return TokenLayout.from_kinds(kinds, None if documents is None else torch.tensor(documents))


def ids_for(layout: TokenLayout, seed: int = 0) -> Tensor:
    """Random token ids, (batch, length)."""
    return torch.randint(3, 40, layout.kinds.shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: LlamaForCausalLM, ids: Tensor, layout: TokenLayout, plan: SkipPlan) -> Tensor:
    """Logits of one forward under ``plan``, without a cache."""
    from skipvision_train.plans import attach

    with attach(model, plan) as attachment:
        if attachment.active:
            return model(ids, token_layout=layout, use_cache=False).logits
        mask = layout.visible()[:, None]
        return model(ids, attention_mask=mask, position_ids=layout.position_ids, use_cache=False).logits


@dataclass(frozen=True)
class Kit:
    """The helpers of this folder, for tests (conftest files cannot be imported)."""

    make_model = staticmethod(make_model)
    layout_of = staticmethod(layout_of)
    ids_for = staticmethod(ids_for)
    logits_of = staticmethod(logits_of)
    slow_logits = staticmethod(slow_logits)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def shared_model() -> LlamaForCausalLM:
    """One model for tests that only run it and leave it as it was."""
    return make_model()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()
