"""Conversations to the tensors of somebody else's model, by its own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from skipvision_train.data.records import IMAGE_MARKER, Turn
from skipvision_train.errors import ConfigError

Chat = tuple[Sequence[Turn], Sequence[Image.Image]]
"""Turns that end with a user's, and their images in the order of the markers."""


def encode_chats(model: nn.Module, processor: Any, chats: Sequence[Chat]) -> dict[str, Tensor]:
    """The processor's tensors for prompts, shorter ones padded on the left.

    The text is written by the processor's chat template; a processor without one gets the texts of the turns, an image
    token for every image.

    Raises:
        ConfigError: neither chat template nor image token, or prompts of different lengths and no padding token.
        ValueError: whatever the processor cannot write.
    """
    several: dict[str, Any] = {}
    if len(chats) > 1:
        if processor.tokenizer.pad_token is None:
            raise ConfigError(f"batch_size: {type(processor.tokenizer).__name__} has no padding token; ask one by one")
        several = {"padding": True, "padding_side": "left"}
    if processor.chat_template is None:
        texts = [_flat_text(model, processor, turns) for turns, _ in chats]
        images = [list(shown) for _, shown in chats]
        return dict(processor(images=images if any(images) else None, text=texts, return_tensors="pt", **several))
    messages = [chat_messages(turns, images) for turns, images in chats]
    return dict(
        processor.apply_chat_template(
            messages if several else messages[0],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            **({"processor_kwargs": several} if several else {}),
        )
    )


def _flat_text(model: Any, processor: Any, turns: Sequence[Turn]) -> str:
    image_id = getattr(model.config, "image_token_id", None)  # transformers has no common base that declares it
    if image_id is None:
        raise ConfigError(
            f"model: {type(processor).__name__} has no chat template and the configuration of "
            f"{type(model).__name__} no image_token_id, so no prompt can show an image"
        )
    image_token = processor.tokenizer.convert_ids_to_tokens(image_id)
    return "\n".join(t.text.replace(IMAGE_MARKER, image_token) if t.role == "user" else t.text for t in turns)


def chat_messages(turns: Sequence[Turn], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Messages in the style of transformers; each image stands where its marker stands.

    Only users show images: elsewhere the marker is text.
    """
    remaining = iter(images)
    messages = []
    for turn in turns:
        content: list[dict[str, Any]] = []
        for index, text in enumerate(turn.text.split(IMAGE_MARKER) if turn.role == "user" else [turn.text]):
            if index:
                content.append({"type": "image", "image": next(remaining)})
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
        messages.append({"role": turn.role, "content": content})
    return messages
