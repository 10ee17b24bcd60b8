"""Small starting checkpoints with random weights, in the formats that real ones come in.

``llm/`` is a transformers directory of the LLaMA architecture with a byte-level BPE tokenizer built like LLaMA-3's: its
splitting rule, its special tokens in its order, its chat template, and no padding token. ``vision/`` is an open_clip
directory. Both are read by the same code as the large ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_train.sketches.questions import CAPTION_REQUESTS, caption, conversation
from skipvision_train.sketches.scenes import TextCard, random_sketch
from skipvision_train.sketches.settings import LanguageSize, VisionSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The splitting rule and the chat template of LLaMA-3 (meta-llama/Meta-Llama-3-8B-Instruct, tokenizer.json and
# tokenizer_config.json).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# LLaMA-3's ids 128000 to 128015 in their order; only the offset, the size of the base vocabulary, is smaller here.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 11)),
)
IMAGE_TOKEN = "<|reserved_special_token_0|>"

_README = """# Starting checkpoints of the sketches

The weights in these two directories are random: nothing was trained. They have the file formats of the real
checkpoints (a LLaMA-3 directory of transformers, a CLIP directory of open_clip), so that the same code reads both.
Only the tokenizer was fitted to data: to captions and questions of the sketches.
"""


def write_checkpoints(folder: Path, llm: LanguageSize, vision: VisionSize, seed: int) -> None:
    """Write ``folder/llm``, ``folder/vision`` and a note that the weights are random."""
    folder.mkdir(parents=True)
    write_language_model(folder / "llm", llm, seed)
    write_vision_model(folder / "vision", vision, seed)
    (folder / "README.md").write_text(_README, encoding="utf-8")


def _corpus(seed: int, sketches: int = 600) -> Iterator[str]:
    """Texts of the data set for the tokenizer; letters of text cards one by one, so that none merge."""
    rng = random.Random(f"{seed}/tokenizer")
    for index in range(sketches):
        sketch = random_sketch(rng, ("scene", "scene", "chart")[index % 3])
        yield caption(rng, sketch)
        for question in conversation(rng, sketch):
            yield f"user\n\n{question.text}\n\nassistant\n\n{question.answer}"
        card = random_sketch(rng, "text")
        assert isinstance(card, TextCard)
        yield from card.text
        yield caption(rng, card).replace(card.text, "")
        yield conversation(rng, card)[0].text
        yield f"system\n\n{rng.choice(CAPTION_REQUESTS)}"


def train_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``vocabulary`` ids, special tokens last, built like LLaMA-3's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    base = vocabulary - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=base, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    for filler in range(base - tokenizer.get_vocab_size()):
        # Every word of the corpus is one token already; ids that are left over stay reserved, as LLaMA-3's do.
        tokenizer.add_special_tokens([AddedToken(f"<|unused_{filler}|>", special=True)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_language_model(folder: Path, size: LanguageSize, seed: int) -> None:
    """Write a transformers directory: config, random weights, tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(size.vocabulary, seed)
    first_special = size.vocabulary - len(SPECIAL_TOKENS)
    begin, end, turn_end = (
        first_special + SPECIAL_TOKENS.index(token) for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    )
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.max_positions,
        initializer_range=size.init_std,
        rms_norm_eps=1e-5,
        bos_token_id=begin,
        eos_token_id=turn_end,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [end, turn_end]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def clip_config(size: VisionSize) -> dict[str, Any]:
    """The ``model_cfg`` of open_clip; the text tower is as small as its code allows, nothing here uses it."""
    return {
        "embed_dim": size.width,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": size.image_size,
            "layers": size.layers,
            "width": size.width,
            "head_width": size.head_width,
            "patch_size": size.patch_size,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 2, "layers": 1},
    }


def write_vision_model(folder: Path, size: VisionSize, seed: int) -> None:
    """Write an open_clip directory: ``open_clip_config.json`` and the state of the whole CLIP model."""
    import torch
    from open_clip import CLIP
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    model_cfg = clip_config(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**model_cfg)
    preprocess = {
        "size": size.image_size,
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    folder.mkdir(parents=True)
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
