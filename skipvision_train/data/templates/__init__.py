"""Chat formats: turns to token ids and labels (``docs/templates.md``).

Every id is written by construction: control tokens by id, text through the tokenizer with special tokens switched off.
No mask is found by searching.
"""

from __future__ import annotations

from skipvision_train.data.templates.base import Template
from skipvision_train.data.templates.formats import (
    BOS,
    EOT,
    QWEN_SYSTEM,
    ChatMlTemplate,
    Llama3Template,
    PlainTemplate,
    VicunaTemplate,
)
from skipvision_train.data.templates.own import TokenizerTemplate
from skipvision_train.data.templates.pieces import IGNORED, Encoded, control_id, split_special, token_ids
from skipvision_train.errors import DataError

__all__ = [
    "BOS",
    "EOT",
    "IGNORED",
    "Encoded",
    "Template",
    "control_id",
    "get_template",
    "split_special",
    "token_ids",
]

_TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Llama3Template(),
        PlainTemplate(),
        VicunaTemplate(),
        ChatMlTemplate(),
        ChatMlTemplate("qwen2_5", QWEN_SYSTEM),
        TokenizerTemplate(),
    )
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        DataError: an unknown name; there is no fallback.
    """
    if name not in _TEMPLATES:
        raise DataError(f"template {name!r} is unknown; use one of {', '.join(_TEMPLATES)}")
    return _TEMPLATES[name]
