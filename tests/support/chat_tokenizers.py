"""Small tokenizers of every family, each with the control tokens of all chat formats; nothing is downloaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE = "<|image_pad|>"
CONTROL = (
    *("<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|im_start|>", "<|im_end|>", IMAGE),
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: system user assistant",
    "What is the capital of France? Paris is the capital. Yes, no! 1 2 3 4 (a) a cat on a mat: it is warm.\n\n",
    "ünïcode 日本 don't :) :( )( ?! -- ...",
] * 4

# Written after the formats that public models come with; the control tokens are those of the tokenizers here.
OWN_TEMPLATES = {
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}{% set said = (system if loop.first else '') + m['content'].strip() %}"
        "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + said + ' [/INST]' }}"
        "{% else %}{{ ' ' + said + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n'"
        " + m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
    ),
    "llama3.2": (
        "{{ '<|begin_of_text|>' }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system"
        " + '<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}


def _finished(tokenizer: Tokenizer, bos: str | None = "<s>", eos: str = "</s>") -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    known = {"unk_token": "<unk>"} if tokenizer.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False, **known
    )


def byte_level(split: bool = True, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Qwen's kind, or RoBERTa's, which puts a space before a text."""
    tokenizer = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not split)
    steps = [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte] if split else [byte]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer, bos=None, eos="<|im_end|>")


def sentencepiece(dummy_prefix: str) -> PreTrainedTokenizerFast:
    """LLaMA-2's kind: BPE over whole texts with a space in front, and bytes for what is not in the vocabulary.

    Args:
        dummy_prefix: ``normalizer`` as in the older files of transformers, before every stretch of text; ``first`` as
            in the newer ones, at the beginning alone; ``always``, which adds none where there is one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    _like_llama2(tokenizer, dummy_prefix)
    return _finished(tokenizer)


def _like_llama2(tokenizer: Tokenizer, dummy_prefix: str) -> None:
    if dummy_prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=dummy_prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: line breaks become spaces, and spaces in a row one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: white space is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer)


def clip() -> PreTrainedTokenizerFast:
    """CLIP's own vocabulary, which open_clip brings along: lower case, words end in ``</w>``."""
    package = find_spec("open_clip")  # without importing it, which takes seconds
    assert package is not None
    assert package.submodule_search_locations is not None
    packed = Path(package.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(line.split()[0], line.split()[1]) for line in lines]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return _finished(tokenizer)


EXACT: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": cache(byte_level),
    "byte-level with prefix space": cache(lambda: byte_level(split=False, prefix_space=True)),
    "sentencepiece": cache(lambda: sentencepiece("normalizer")),
    "sentencepiece, first": cache(lambda: sentencepiece("first")),
    "sentencepiece, always": cache(lambda: sentencepiece("always")),
}
"""Tokenizers that decode what they encoded."""

LOSSY: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "unigram": cache(unigram),
    "word piece": cache(word_piece),
    "clip": cache(clip),
}
"""Tokenizers that change texts (case, white space, unknown characters)."""


def _spelled(tokens: dict[str, int], order: Iterable[str]) -> models.BPE:
    """BPE that knows these tokens under these ids, each built from its characters from left to right."""
    vocabulary, merges = dict(tokens), []
    for token in order:
        for end in range(1, len(token) + 1):
            vocabulary.setdefault(token[end - 1], 900000 + len(vocabulary))
            vocabulary.setdefault(token[:end], 900000 + len(vocabulary))
            if end > 1 and (pair := (token[: end - 1], token[end - 1])) not in merges:
                merges.append(pair)
    return models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", ignore_merges=True)


def _ids(words: str) -> dict[str, int]:
    pairs = words.split()
    return {word: int(index) for word, index in zip(pairs[::2], pairs[1::2], strict=True)}


def vicuna_words() -> PreTrainedTokenizerFast:
    """The ids that LLaMA-2's tokenizer gives to the words of Vicuna's golden vectors."""
    ids = _ids(
        "▁A 319 ▁chat 13563 ▁between 1546 ▁a 263 ▁curious 12758 ▁user 1404 ▁and 322 ▁an 385 ▁artificial 23116 "
        "▁intelligence 21082 ▁assistant 20255 . 29889 ▁The 450 ▁gives 4076 ▁helpful 8444 , 29892 ▁detailed 13173 "
        "▁pol 1248 ▁answers 6089 ▁to 304 ▁the 278 ' 29915 s 29879 ▁questions 5155 ▁US 3148 ER 1001 : 29901 SS "
        "1799 IST 9047 ANT 13566 ▁Who 11644 ▁are 526 ▁you 366 ? 29973 ▁I 306 ▁can 508 ▁What 1724 ▁do 437 ▁with "
        "411 ▁ 29871 ▁am 626 ▁Vic 13423 ▁language 4086 ▁model 1904 ▁trained 16370 ▁by 491 ▁research 5925 ▁from 515 "
        "▁Lar 8218 ▁Model 8125 ▁Systems 23985 ▁Organ 9205 ization 2133 ▁( 313 L 29931 MS 4345 YS 21554 ). 467 "
        "▁is 338 ite 568 una 4347 ers 414 ge 479 What 5618"
    )
    known = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 13} | ids
    tokenizer = Tokenizer(_spelled(known, ids))
    _like_llama2(tokenizer, "normalizer")
    return _finished(tokenizer)


def qwen_words() -> PreTrainedTokenizerFast:
    """The ids that Qwen2.5's tokenizer gives to the words of ChatML's golden vectors."""
    ids = _ids(
        "system 8948 user 872 assistant 77091 Ċ 198 You 2610 Ġare 525 ĠQ 1207 wen 16948 , 11 Ġcreated 3465 Ġby "
        "553 ĠAlibaba 54364 ĠCloud 14817 . 13 ĠYou 1446 Ġa 264 Ġhelpful 10950 Ġassistant 17847 What 3838 's 594 Ġ "
        "220 2 17 + 10 ? 30 4 19"
    )
    control = {"<unk>": 0, "<|im_start|>": 151644, "<|im_end|>": 151645}
    tokenizer = Tokenizer(_spelled(control | ids, ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, bos=None, eos="<|im_end|>")
