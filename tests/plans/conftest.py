"""Tiny models, hand-made layouts, and a slow reference of the executor that shares no code with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
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


# --- the reference -------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of (n, D) as complex numbers (component i pairs with i + D/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def slow_sequence(model: LlamaForCausalLM, ids: Tensor, kinds: list, plan: SkipPlan, visible: Tensor) -> Tensor:
    """Logits (n, V) of one sequence without padding: everybody computes everything, then updates are zeroed."""
    config, n = model.config, len(kinds)
    width = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    positions = torch.arange(n).float()
    h = model.model.embed_tokens.weight[ids]
    for layer, rule in zip(model.model.layers, plan.rules, strict=True):
        x = rms_norm(h, layer.input_layernorm)
        attention = layer.self_attn
        heads = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.num_key_value_heads)
            q = attention.q_proj(x)[:, head * width : (head + 1) * width]
            k = attention.k_proj(x)[:, shared * width : (shared + 1) * width]
            v = attention.v_proj(x)[:, shared * width : (shared + 1) * width]
            scores = rotated(q, positions, theta) @ rotated(k, positions, theta).T / math.sqrt(width)
            heads.append(torch.where(visible, scores, -torch.inf).softmax(-1) @ v)
        update = attention.o_proj(torch.cat(heads, dim=-1))
        off = torch.tensor([kind in rule.no_attention for kind in kinds])[:, None]
        h = h + torch.where(off, x if rule.bypass == "norm" else torch.zeros_like(x), update)
        x = rms_norm(h, layer.post_attention_layernorm)
        update = layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        off = torch.tensor([kind in rule.no_ffn for kind in kinds])[:, None]
        h = h + torch.where(off, torch.zeros_like(x), update)
    return model.lm_head(rms_norm(h, model.model.norm))


def slow_logits(
    model: LlamaForCausalLM,
    ids: Tensor,
    layout: TokenLayout,
    plan: SkipPlan,
    hidden_from: Callable[[int], int] | None = None,
) -> Tensor:
    """Reference logits (B, T, V), zero on padding: each document of each row is run alone, without padding.

    ``hidden_from(n)``: from this index of a sequence of length n on, queries do not see the kinds of ``plan.evict``
    that stand before it.
    """
    rows = []
    for row, kinds in enumerate(layout.kinds):
        logits = torch.zeros(len(kinds), model.config.vocab_size)
        ids_of_documents = torch.zeros_like(kinds) if layout.document_ids is None else layout.document_ids[row]
        for document in ids_of_documents.unique():
            where = ((ids_of_documents == document) & (kinds != PAD)).nonzero()[:, 0]
            if not len(where):
                continue
            own = [TokenKind(int(kinds[i])) for i in where]
            visible = torch.ones(len(own), len(own)).tril().bool()
            if hidden_from is not None:
                evicted = torch.tensor([kind in plan.evict for kind in own])
                evicted[hidden_from(len(own)) :] = False
                visible[hidden_from(len(own)) :] &= ~evicted
            logits = logits.index_put((where,), slow_sequence(model, ids[row, where], own, plan, visible))
        rows.append(logits)
    return torch.stack(rows)


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
