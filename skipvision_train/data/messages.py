"""Messages in the style of transformers, and the chat template that other programs read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from skipvision_train.data.records import IMAGE_MARKER, Turn
from skipvision_train.data.templates.formats import QWEN_SYSTEM, VICUNA_SYSTEM
from skipvision_train.errors import DataError

Picture = Image.Image | str | Path
"""An image, or the file that holds it."""

_ROLES = ("system", "user", "assistant")

# A message's content: text, or parts, stripped and joined by newlines, with one placeholder per image.
_CONTENT = r"""{%- macro content(message) %}
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
{%- endmacro %}
"""

_LLAMA3 = r"""{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content(message) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

_VICUNA = r"""{{- '<s>' }}
{%- if messages[0]['role'] != 'system' %}
    {{- SYSTEM + ' ' }}
{%- endif %}
{%- for message in messages %}
    {%- set text = content(message) %}
    {%- if message['role'] == 'system' %}
        {{- text + ' ' }}
    {%- elif message['role'] == 'user' %}
        {{- 'USER:' + (' ' + text if text else '') }}
    {%- else %}
        {{- ' ASSISTANT: ' + text + '</s>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' ASSISTANT:' }}
{%- endif %}
"""

_CHATML = r"""{%- if SYSTEM and messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + content(message) + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# What the templates of the same names write (data/templates), for other programs.
_CHAT_TEMPLATES = {
    "llama3": _LLAMA3,
    "vicuna_v1": _VICUNA.replace("SYSTEM", json.dumps(VICUNA_SYSTEM)),
    "chatml": _CHATML.replace("SYSTEM", "''"),
    "qwen2_5": _CHATML.replace("SYSTEM", json.dumps(QWEN_SYSTEM)),
}


def chat_template(template: str, image_token: str) -> str | None:
    """The chat format in Jinja, for content that is text or a list of text and image parts.

    Args:
        template: name of a template of ``data/templates``.
        image_token: what stands for an image.

    Returns:
        None for a format that has no Jinja text of its own: ``plain``, which is no chat, and ``tokenizer``.
    """
    text = _CHAT_TEMPLATES.get(template)
    return None if text is None else (_CONTENT + text).replace("IMAGE_TOKEN", image_token)


def flat_messages(messages: Sequence[Mapping[str, Any]], image_token: str) -> list[dict[str, Any]]:
    """Messages whose content is text, an image being its token: chat templates of language models know no parts.

    Raises:
        DataError: naming the message or part and what is wrong with it.
    """
    result = []
    for index, message in enumerate(messages):
        parts = _parts(message, f"message {index}")
        kinds = [_part_kind(part, f"message {index}, part {number}") for number, part in enumerate(parts)]
        texts = [
            image_token if kind == "image" else part["text"].strip() for kind, part in zip(kinds, parts, strict=True)
        ]
        result.append({**message, "content": "\n".join(text for text in texts if text)})
    return result


def conversation_turns(
    messages: Sequence[Mapping[str, Any]], loose: Iterator[Picture]
) -> tuple[list[Turn], list[Picture]]:
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
    images: list[Picture] = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        parts = _parts(message, where)
        texts = [_part(part, f"{where}, part {number}", loose, images) for number, part in enumerate(parts)]
        turns.append(Turn(str(message["role"]), "\n".join(text for text in texts if text)))
    return turns, images


def _parts(message: Any, where: str) -> Sequence[Any]:
    """The content of a message as parts."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise DataError(f"{where}: a mapping with 'role' and 'content' is expected")
    if message["role"] not in _ROLES or message.get("tool_calls"):
        what = "calls tools" if message["role"] in _ROLES else f"has the role {message['role']!r}"
        raise DataError(f"{where} {what}; the roles are {', '.join(_ROLES)}, and no chat format here has tools")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence):
        raise DataError(f"{where}: content must be text or a list of parts, found {type(content).__name__}")
    return parts


def _part(part: Any, where: str, loose: Iterator[Picture], images: list[Picture]) -> str:
    """The part's text, stripped; its images are appended to ``images``."""
    if _part_kind(part, where) == "text":
        for _ in range(part["text"].count(IMAGE_MARKER)):
            images.append(_next(loose, where))
        return str(part["text"]).strip()
    given = [part[key] for key in ("image", "path") if part.get(key) is not None]
    if "url" in part or (given and isinstance(given[0], str) and given[0].startswith(("http://", "https://"))):
        raise DataError(f"{where}: images are not downloaded; give a PIL image or the path of a file")
    image = given[0] if given else _next(loose, where)
    if not isinstance(image, Image.Image | str | Path):
        raise DataError(f"{where}: an image must be a PIL image or a path, found {type(image).__name__}")
    images.append(image)
    return IMAGE_MARKER


def _part_kind(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image" or (kind == "text" and isinstance(part.get("text"), str)):
        return str(kind)
    raise DataError(f"{where}: a text part or an image part is expected, found {part!r:.80}")


def _next(loose: Iterator[Picture], where: str) -> Picture:
    image = next(loose, None)
    if image is None:
        raise DataError(f"{where}: an image is expected here, but neither the part nor 'images' brings one")
    return image
