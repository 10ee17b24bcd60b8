"""Tiny instances of transformers' own vision-language models with their own processors: random, fp32, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from skipvision_train.plans import SkipPlan, TokenKind

SPECIAL = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<img>")
SPECIAL += ("</img>", "<IMG_CONTEXT>", "<reg>")
WORDS = tuple(f"w{i}" for i in range(30))
IDS = {word: i for i, word in enumerate(("<pad>", "<unk>", *SPECIAL, *WORDS))}
LAYERS = 3
TEXT: dict[str, Any] = {
    "vocab_size": len(IDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VIT: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
SIZE = {"height": 8, "width": 8}
PINPOINTS = [[8, 16], [16, 8], [16, 16]]
QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}

ROWS = ("w1 {} w2 w3 {} w4 w5", "w6 {} w7", "w8 w9 w10")
"""Two images, one, none."""
IMAGE_SIZES = ((24, 16), (9, 30), (16, 17))
"""Width and height, in order of appearance."""


def make_tokenizer(**roles: str) -> hf.PreTrainedTokenizerFast:
    """One token per word, padding at the left; ``roles`` are special tokens that a processor asks for by name."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=roles or None,
    )


def make_images() -> list[Image.Image]:
    """Noise, in the sizes of ``IMAGE_SIZES``."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in IMAGE_SIZES]
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


@dataclass(frozen=True)
class Family:
    """A model, its processor, and how a prompt names an image.

    Attributes:
        marker: what stands for an image in the text given to the processor.
        images: in order of appearance in ``ROWS``.
    """

    model: Any
    processor: Any
    marker: str

    images: tuple[Image.Image, ...] = field(default_factory=lambda: tuple(make_images()))

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def inputs(self, *rows: int, padding_side: str = "left") -> dict[str, Tensor]:
        """A batch of the given ``ROWS``, as the processor makes it."""
        images = list(self.images)
        by_row = [images[:2], images[2:], []]
        given = [by_row[row] for row in rows if by_row[row]]
        text = [ROWS[row].replace("{}", self.marker) for row in rows]
        return dict(
            self.processor(
                images=given or None, text=text, padding=True, padding_side=padding_side, return_tensors="pt"
            )
        )


def make_llava() -> Family:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IDS["<image>"],
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    processor = hf.LlavaProcessor(
        hf.LlavaImageProcessor(size={"shortest_edge": 8}, crop_size=SIZE),
        make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Family(hf.LlavaForConditionalGeneration(config), processor, "<image>")


def make_llava_next() -> Family:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": 8}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS),
        make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Family(hf.LlavaNextForConditionalGeneration(config), processor, "<image>")


def make_llava_onevision() -> Family:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS),
        make_tokenizer(),
        hf.LlavaOnevisionVideoProcessor(size=SIZE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return Family(hf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>")


def make_internvl() -> Family:
    vision = {**VIT, "image_size": 16, "use_mask_token": False}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IDS["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    size = {"height": 16, "width": 16}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=2),
        make_tokenizer(**roles, video_token="<video>"),
        hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    return Family(hf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>")


def _qwen(model: Any, processor_class: type, video_processor: Any) -> Family:
    size = {"shortest_edge": 64, "longest_edge": 512}
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)
    processor = processor_class(images, make_tokenizer(), video_processor(patch_size=4, merge_size=2, size=size))
    return Family(model, processor, "<|vision_start|><|image_pad|><|vision_end|>")


def make_qwen2_vl() -> Family:
    config = hf.Qwen2VLConfig(
        vision_config={**QWEN_VIT, "embed_dim": 16, "hidden_size": 32},
        text_config={**TEXT, "rope_parameters": MROPE},
        **QWEN_IDS,
    )
    return _qwen(hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor)


def make_qwen2_5_vl() -> Family:
    vision = {**QWEN_VIT, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(
        vision_config={**vision, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": MROPE},
        **QWEN_IDS,
    )
    return _qwen(hf.Qwen2_5_VLForConditionalGeneration(config), hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor)


def make_qwen3_vl() -> Family:
    vision = {**QWEN_VIT, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    config = hf.Qwen3VLConfig(
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        **QWEN_IDS,
    )
    return _qwen(hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)


MAKERS: dict[str, Callable[[], Family]] = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "internvl": make_internvl,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
}


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every sublayer matters; biases and norms at 0 and 1 would hide mistakes."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = parameter.ndim == 1 and "bias" not in name
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.2)


def make_family(name: str) -> Family:
    family = MAKERS[name]()
    randomise(family.model)
    family.model.eval()
    return family


# --- the reference -------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_logits(family: Family, inputs: dict[str, Tensor], plan: SkipPlan) -> Tensor:
    """Logits (B, T, V) of one forward in which everybody computes everything; then updates are zeroed.

    Ranked drops and eviction are not in it. What stock code hands the decoder (embeddings with the images in place,
    three-dimensional positions, DeepStack) is taken from a stock forward.
    """
    decoder, call = family.decoder, {}
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: call.update(kwargs), with_kwargs=True)
    family.model(**inputs, use_cache=False)
    handle.remove()
    hidden, real = call["inputs_embeds"], inputs["attention_mask"].bool()
    visual = inputs["input_ids"] == family.image_token_id
    positions = call["position_ids"]
    cos_sin = decoder.rotary_emb(hidden, real.cumsum(-1) - 1 if positions is None else positions)
    itself = torch.eye(real.shape[1], dtype=torch.bool)
    visible = torch.ones_like(itself).tril() & real[:, None, :] | itself
    for i, (layer, rule) in enumerate(zip(decoder.layers, plan.rules, strict=True)):
        gone = visual & any(drop.layer <= i for drop in plan.drops)
        normed = layer.input_layernorm(hidden)
        update, _ = layer.self_attn(
            hidden_states=normed,
            position_embeddings=cos_sin,
            attention_mask=(visible & ~gone[:, None, :] | itself)[:, None],
        )
        off = (visual & (TokenKind.SKIPPED in rule.no_attention))[..., None]
        hidden = hidden + torch.where(off, normed if rule.bypass == "norm" else torch.zeros_like(normed), update)
        update = layer.mlp(layer.post_attention_layernorm(hidden))
        off = (visual & (TokenKind.SKIPPED in rule.no_ffn))[..., None]
        hidden = hidden + torch.where(off, torch.zeros_like(update), update)
        if i < len(call.get("deepstack_visual_embeds") or ()):
            hidden[call["visual_pos_masks"]] += call["deepstack_visual_embeds"][i]
    return family.model.lm_head(decoder.norm(hidden))


def state_of(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, hooks included.

    Qwen's models remember the offset of the last prompt's positions (``rope_deltas``), plan or not: left out.
    """
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key != "rope_deltas"
        }
        for name, module in model.named_modules()
    }
