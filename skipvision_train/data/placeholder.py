"""Which token may stand for an image: a special one that means nothing else, to the tokenizer or to the chat format."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import Turn
from skipvision_train.data.templates import get_template
from skipvision_train.data.templates.pieces import Piece, token_ids
from skipvision_train.errors import DataError

CONVERSATIONS = (("user", "assistant"), ("system", "user", "assistant", "user", "assistant"))
"""Roles that together use every control token of a format."""

UNKNOWN_CHARACTER = "\ue000"
"""Of the private use area, in nobody's vocabulary."""


def taken(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[int, str]:
    """Ids that mean something, with what they mean, in words that follow "is".

    A placeholder among them would be an image wherever text begins or ends. A padding token may be one: the processor
    pads with another then (Vicuna has no other that is free).

    Args:
        tokenizer: its first and last token, and its unknown token if text can become that.
        template: a name from docs/templates.md, whose control tokens are taken as well.

    Raises:
        DataError: an unknown template.
    """
    found = dict.fromkeys(_control_ids(tokenizer, template), f"a control token of template {template}")
    if tokenizer.unk_token_id in token_ids([Piece(UNKNOWN_CHARACTER)], tokenizer)[0]:
        found[tokenizer.unk_token_id] = "what text outside of the vocabulary becomes"
    for index, meaning in (
        (tokenizer.bos_token_id, "the token that texts begin with (bos_token)"),
        (tokenizer.eos_token_id, "the token that texts end with (eos_token)"),
    ):
        if index is not None:
            found[index] = meaning
    return found


def _control_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> set[int]:
    """Every id that the format writes itself; none for a tokenizer that it does not fit, which encoding refuses."""
    chosen, ids = get_template(template), set[int]()
    for roles in CONVERSATIONS:
        try:
            blocks = chosen.blocks([Turn(role, "a") for role in roles], tokenizer, iter(()))
        except DataError:  # a format without system turns, or for another tokenizer
            continue
        ids.update(
            index for block in blocks for piece in block if isinstance(piece.content, list) for index in piece.content
        )
    return ids


def free(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Special tokens that may stand for an image, those named for something like it first.

    Raises:
        DataError: an unknown template.
    """
    used = taken(tokenizer, template)
    added = tokenizer.added_tokens_decoder.items()
    names = [str(token) for index, token in added if token.special and index not in used]
    return sorted(names, key=lambda name: ("image" not in name, "reserved" not in name))


def listed(tokens: Sequence[str]) -> str:
    """What a message says of :func:`free` ones: the first three, or what to do where there are none."""
    return " or ".join(tokens[:3]) or (
        "none yet: add one to the tokenizer and a row for it to the language model (add_special_tokens, "
        "resize_token_embeddings), and save both"
    )
