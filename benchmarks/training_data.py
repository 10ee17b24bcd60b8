"""Ragged records, a tokenizer and sizes of models for the benchmarks that train."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>")
CONTROL += ("<|end_header_id|>", "<|eot_id|>")

TEXT_ONLY = 40_688 / 665_298
"""Records without an image in LLaVA's mix665k."""


@dataclass(frozen=True)
class Sizes:
    """What is trained on what.

    Attributes:
        text: fields of ``model.text``.
        vision: fields of ``model.vision``.
        median: of a record's text, in tokens (bytes).
        longest: text; what is drawn longer is cut.
        batch: rows of a forward pass, each with one record.
        packed: rows of a forward pass, packed.
        row: tokens of a packed row.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    median: int
    longest: int
    batch: int
    packed: int
    row: int


SIZES = {
    "cpu": Sizes(
        {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"image_size": 112, "width": 96, "layers": 3, "heads": 3, "depths": [2]},
        median=60, longest=640, batch=4, packed=1, row=640,
    ),
    "llava_1_5_7b": Sizes(
        {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
        {},
        median=150, longest=1024, batch=4, packed=1, row=4096,
    ),
    "tiny": Sizes(
        {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"image_size": 28, "width": 32, "layers": 2, "heads": 2, "depths": [1]},
        median=20, longest=256, batch=2, packed=1, row=256,
    ),
}  # fmt: skip


def write_workspace(folder: Path, sizes: Sizes, records: int) -> None:
    """A byte tokenizer, and a recipe of one source."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ).save_pretrained(folder / "tokenizer")
    chance, found = random.Random(0), []
    (folder / "images").mkdir()
    for number in range(records):
        length = min(sizes.longest, max(8, round(sizes.median * chance.lognormvariate(0, 0.8))))
        answer = max(4, length // 2)
        turns = [{"from": "human", "value": "q" * (length - answer)}, {"from": "gpt", "value": "a" * answer}]
        record: dict[str, Any] = {"id": number, "conversations": turns}
        if chance.random() >= TEXT_ONLY:
            size = sizes.vision.get("image_size", 336)
            Image.effect_noise((size, size), 60).convert("RGB").save(folder / "images" / f"{number}.jpg")
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            record["image"] = f"{number}.jpg"
        found.append(record)
    (folder / "data.json").write_text(json.dumps(found))
    source = {"name": "ragged", "path": "data.json", "image_root": "images"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source]}))
