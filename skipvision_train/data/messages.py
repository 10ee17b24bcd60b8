"""Messages in the style of transformers, and the chat template that other programs read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from skipvision_train.data.records import IMAGE_MARKER, Turn
from skipvision_train.errors import DataError

# Writes what Llama3Template writes, with one placeholder per image; parts are stripped and joined by newlines.
_LLAMA3 = r"""{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- set written = namespace(any=false) %}
        {%- for part in message['content'] %}
            {%- set text = 'IMAGE_TOKEN' if part['type'] == 'image' else part['text'] | trim %}
            {%- if text %}
                {{- ('\n' if written.any else '') + text }}
                {%- set written.any = true %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def llama3_chat_template(image_token: str) -> str:
    """LLaMA-3's chat template in Jinja, for content that is text or a list of text and image parts."""
    return _LLAMA3.replace("IMAGE_TOKEN", image_token)


def conversation_turns(
    messages: Sequence[Mapping[str, Any]], loose: Iterator[Image.Image]
) -> tuple[list[Turn], list[Image.Image | str | Path]]:
    """Turns with image markers, and the images in order of the markers.

    Args:
        messages: ``{"role", "content"}``; content is text (which may hold image markers), or a list of
            ``{"type": "text", "text"}`` and ``{"type": "image"}`` parts, the latter with the image or its path under
            ``image`` or ``path``, or without.
        loose: yields the images of markers and parts that bring none.

    Raises:
        DataError: naming the message and what is wrong with it.
    """
    turns: list[Turn] = []
    images: list[Image.Image | str | Path] = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"{where}: a mapping with 'role' and 'content' is expected")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise DataError(f"{where}: content must be text or a list of parts, found {type(content).__name__}")
        texts = [_part(part, f"{where}, part {number}", loose, images) for number, part in enumerate(parts)]
        turns.append(Turn(str(message["role"]), "\n".join(text for text in texts if text)))
    return turns, images


def _part(part: Any, where: str, loose: Iterator[Image.Image], images: list[Image.Image | str | Path]) -> str:
    """The part's text, stripped; its images are appended to ``images``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        for _ in range(part["text"].count(IMAGE_MARKER)):
            images.append(_next(loose, where))
        return str(part["text"]).strip()
    if kind != "image":
        raise DataError(f"{where}: a text part or an image part is expected, found {part!r:.80}")
    given = [part[key] for key in ("image", "path") if part.get(key) is not None]
    if "url" in part or (given and isinstance(given[0], str) and given[0].startswith(("http://", "https://"))):
        raise DataError(f"{where}: images are not downloaded; give a PIL image or the path of a file")
    image = given[0] if given else _next(loose, where)
    if not isinstance(image, Image.Image | str | Path):
        raise DataError(f"{where}: an image must be a PIL image or a path, found {type(image).__name__}")
    images.append(image)
    return IMAGE_MARKER


def _next(loose: Iterator[Image.Image], where: str) -> Image.Image:
    image = next(loose, None)
    if image is None:
        raise DataError(f"{where}: an image is expected here, but neither the part nor 'images' brings one")
    return image
