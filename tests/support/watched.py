"""A tiny model of ours with its processor, its samples, and a slow sequence that remembers what its layers computed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from slow_plans import SlowSequence, rms_norm
from torch import Tensor

from skipvision_train.calibration.samples import Sample
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import SkipPlan, TokenKind


def make_ours(config: SkipVisionConfig) -> tuple[SkipVisionForConditionalGeneration, SkipVisionProcessor]:
    """Language model weights large enough that every sublayer matters."""
    tokenizer = byte_tokenizer()
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config).eval()
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model, SkipVisionProcessor.from_config(config, tokenizer)


def sample_of(inputs: dict[str, Tensor], name: str = "s") -> Sample:
    """Asks for the token after the last one."""
    read = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    read[:, -1] = True
    return Sample(name, "", inputs, read)


def our_samples(model: SkipVisionForConditionalGeneration) -> list[Sample]:
    """One image, and two."""
    token, size = model.config.image_token_id, model.config.vision_config.image_size
    image = [token] * len(model.config.image_token_kinds())
    generator, samples = torch.Generator().manual_seed(0), []
    for name, row in (("one", [5, *image, 6, 7]), ("two", [8, *image, 9, *image, 10, 11, 12])):
        images = row.count(token) // len(image)
        pixels = torch.randn(images, 3, size, size, generator=generator)
        samples.append(sample_of({"input_ids": torch.tensor([row]), "pixel_values": pixels}, name))
        samples[-1].inputs["token_kinds"] = model.token_kinds(samples[-1].inputs["input_ids"])
    return samples


@dataclass(frozen=True)
class Seen:
    """One layer: the live tokens, and of these the attention maps (H, m, m), h_attn, FFN update and output (m, C)."""

    live: list[int]
    maps: Tensor
    attended: Tensor
    update: Tensor
    leaving: Tensor


class Watched(SlowSequence):
    """A slow sequence from embeddings (n, C) instead of token ids."""

    def __init__(self, model: Any, embeds: Tensor, kinds: Tensor, plan: SkipPlan, prompt: int | None = None) -> None:
        """``model``: with ``model`` (a decoder) and ``lm_head``; ``prompt``: tokens that drops and eviction know of."""
        decoder = SimpleNamespace(
            embed_tokens=SimpleNamespace(weight=embeds), layers=model.model.layers, norm=model.model.norm
        )
        whole = SimpleNamespace(config=model.model.config, lm_head=model.lm_head, model=decoder)
        own, prompt = [TokenKind(int(kind)) for kind in kinds], prompt or len(kinds)
        visible = torch.ones(len(own), len(own)).bool()
        visible[prompt:, :prompt] = ~torch.tensor([kind in plan.evict for kind in own[:prompt]])
        super().__init__(whole, own, plan, visible, [prompt - 1], prompt)
        self.seen: list[Seen] = []
        with torch.no_grad():
            self.output = self.logits(torch.arange(len(own)))

    def layer(self, layer: Any, rule: Any, h: Tensor) -> Tensor:
        kinds, x = [self.kinds[i] for i in self.live], rms_norm(h, layer.input_layernorm)
        maps = self.maps(layer, x)
        values = self.heads(layer.self_attn.v_proj(x), self.model.config.num_key_value_heads)
        mixed = layer.self_attn.o_proj(
            torch.cat([share @ value for share, value in zip(maps, values, strict=True)], -1)
        )
        silent = torch.tensor([kind in rule.no_attention for kind in kinds])[:, None]
        h = h + torch.where(silent, x if rule.bypass == "norm" else torch.zeros_like(x), mixed)
        x = rms_norm(h, layer.post_attention_layernorm)
        update = layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        idle = torch.tensor([kind in rule.no_ffn for kind in kinds])[:, None]
        self.seen.append(Seen(list(self.live), maps, h, update, h + torch.where(idle, torch.zeros_like(x), update)))
        return self.seen[-1].leaving


def prompt_embeds(model: Any, sample: Sample) -> Tensor:
    """(T, C): what the language model gets, read off a stock forward of our model."""
    tokens = model.language_model.model.embed_tokens(sample.inputs["input_ids"][0])
    visual = sample.inputs["input_ids"][0] == model.config.image_token_id
    tokens[visual] = model.encode_images(sample.inputs["pixel_values"]).tokens
    return tokens.detach()
