"""Small real tokenizers with LLaMA-3's splitting rule and control tokens, and a processor for the tiny model."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import ImageRef, Record, Turn

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CORPUS = ["system user assistant\n\n", "What is the capital of France?\n\n", "Paris is the capital.", "! yes, no"] * 4


def like_llama3(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add what LLaMA-3's tokenizer has around its vocabulary: splitting, special tokens, BOS in front of a text."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    bos = CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>", clean_up_tokenization_spaces=False
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that can spell any text; id 0 is "!", and there is no padding token, as in LLaMA-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return like_llama3(tokenizer)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def fresh_tokenizer():
    """One that the test may change."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def golden_tokenizer():
    """LLaMA-3's own ids for the words of the golden vector."""
    words = {"system": 9125, "user": 882, "assistant": 78191, "ĊĊ": 271, "What": 3923, "Ġis": 374, "Ġthe": 279}
    words |= {"Ġcapital": 6864, "Ġof": 315, "ĠFrance": 9822, "?": 30, "Paris": 60704, "<unk>": 1}
    control = dict(zip(CONTROL, (128000, 128001, 128002, 128006, 128007, 128009), strict=True))
    return like_llama3(Tokenizer(models.WordLevel(words | control, unk_token="<unk>")))


@pytest.fixture
def image_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")


@pytest.fixture
def config(config_factory, tokenizer, image_id):
    """The tiny model; an image is 2 retained, 4 middle, summary, 5 skipped, 1 retained, summary: 14 tokens."""
    return config_factory(image_token_id=image_id)


@pytest.fixture
def processor(config, fresh_tokenizer):
    return SkipVisionProcessor.from_config(config, fresh_tokenizer)


@pytest.fixture
def picture():
    """Makes an RGB image of noise."""

    def make(width: int = 20, height: int = 20, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def turns():
    """``turns("question", "answer", ...)``; a leading ``system=`` adds a system turn."""

    def make(*texts: str, system: str | None = None) -> list[Turn]:
        roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
        first = [] if system is None else [Turn("system", system)]
        return first + [Turn(role, text) for role, text in zip(roles, texts, strict=True)]

    return make


@pytest.fixture
def record():
    def make(turns, images=(), identity="7"):
        return Record(identity, "test", tuple(map(ImageRef, images)), tuple(turns))

    return make


@pytest.fixture
def llava():
    """One entry of a LLaVA file."""

    def make(*texts: str, image=None, **extra):
        roles = [("human", "gpt")[i % 2] for i in range(len(texts))]
        entry = {"id": "a", "conversations": [{"from": r, "value": t} for r, t in zip(roles, texts, strict=True)]}
        return entry | ({} if image is None else {"image": image}) | extra

    return make


@pytest.fixture
def write_tar(tmp_path):
    """``write_tar("a.tar", {"0.txt": b"..."})`` or with a list of pairs, where names occur twice."""

    def write(name, members):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, data in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        return path

    return write


@pytest.fixture
def write_json(tmp_path):
    def write(content, name="data.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write
