"""``skipvision data preview`` as a user meets it: the page, read back, against the data and against training."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image

from skipvision_train import cli
from skipvision_train.analysis.preview_page import PreviewInputs, chip_text, render_preview, shown
from skipvision_train.config.resolve import model_config
from skipvision_train.config.specs import TrainConfig
from skipvision_train.data.preview import Sample, Token
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Record, Turn
from skipvision_train.models.settings import ReducerConfig, TilingConfig
from skipvision_train.resources import resource_dir
from skipvision_train.training.run import open_dataset

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'"
VOID = ("meta", "br", "img", "link", "input", "hr")


class Page(HTMLParser):
    """The parts of a page that tests look at.

    Attributes:
        elements: names of all elements, with their attributes.
        articles: per sample its text, and its chips: tooltip, text, and whether it stands in a ``mark``.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.articles: list[dict] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._in_article = False
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "article":
            self.articles.append({"text": "", "chips": [], "images": []})
            self._in_article = True
        if tag == "img":
            self.articles[-1]["images"].append(found["src"])
        if self._in_article and tag == "span" and "title" in found:
            marked = any(name == "mark" for name, _ in self._open)
            self.articles[-1]["chips"].append([found["title"], "", marked])
        if tag not in VOID:
            self._open.append((tag, found))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag
        self._in_article = self._in_article and tag != "article"

    def handle_data(self, data):
        if self._in_article:
            self.articles[-1]["text"] += data
            if any("title" in attrs for _, attrs in self._open):
                self.articles[-1]["chips"][-1][1] += data


def ids_of(article, image_id, marked_only=False):
    """The row's token ids from the tooltips of its chips."""
    found = []
    for title, _, marked in article["chips"]:
        if marked_only and not marked:
            continue
        if title.startswith("in this order"):
            found += [image_id] * sum(int(count) for count in re.findall(r"\d+", title))
        else:
            found.append(int(title))
    return found


def chat(*texts, **extra):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]} | extra


CHATS = [
    chat("<image>\nWhat?", "A cat.", "Where?", "On a <b>mat</b>.", id="two turns", image="a.png"),
    chat("<image> or <image>", "Neither.", id="two images", image=["a.png", "b.png"]),
    chat(EVIL, EVIL, id=EVIL, task=EVIL),
    chat("<image>", "gone", id="no file", image=f"{EVIL.replace('/', '')}.png"),
    chat("<image> <image>", "x", id="markers", image="a.png"),
    chat("Q?", "A.", "More?", "No, " * 90, id="long"),
]
RECIPE = """
sources:
  - {name: "chats <script>", path: chats.json, image_root: images}
  - {name: few, path: chats.json, image_root: images, first: 1}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "a.png")
    Image.new("RGB", (64, 32), "blue").save(tmp_path / "images" / "b.png")
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", "preview", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


@pytest.fixture
def checkpoint(tmp_path, config_factory):
    def make(**overrides):
        tokenizer = byte_tokenizer()
        config = config_factory(image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), **overrides)
        config.save_pretrained(tmp_path / "model")
        processor = SkipVisionProcessor.from_config(config, tokenizer)
        processor.save_pretrained(tmp_path / "model")
        return processor

    return make


def by_title(page):
    return {re.split(r"\n|record \d", article["text"].strip())[0]: article for article in page.articles}


def test_the_page_of_a_checkpoint(command, checkpoint, tmp_path):
    processor = checkpoint()
    status, out, error = command("mine.yaml", "checkpoint=model", "samples=6", "data.max_length=300")
    assert (status, "error:" in error) == (0, False)
    path = tmp_path / "outputs" / "data_preview" / "mine.html"
    assert out == "wrote outputs/data_preview/mine.html: 7 samples, 2 of them cannot be used\n"
    page = Page(path.read_text(encoding="utf-8"))
    articles = by_title(page)
    assert len(page.articles) == 7
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    for name, answers in (("two turns", CHATS[0]), ("two images", CHATS[1]), (EVIL, CHATS[2])):
        expected = [turn["value"] for turn in answers["conversations"] if turn["from"] == "gpt"]
        learned = tokenizer.decode(ids_of(articles[name], image_id, marked_only=True))
        assert learned == "".join(answer + "<|eot_id|>" for answer in expected)
    assert len(articles["two images"]["images"]) == 2
    assert "no such image file" in articles["no file"]["text"]
    assert articles["no file"]["chips"] == []
    assert "2 <image> markers in the conversation, but 1 images" in " ".join(a["text"] for a in page.articles)
    long = articles["long"]
    assert tokenizer.decode(ids_of(long, image_id, marked_only=True)) == "A.<|eot_id|>"
    assert "assistant (cut)" in long["text"]
    assert "2 turns (" in long["text"]
    assert "cut by max_length" in long["text"]


def test_nothing_of_the_data_becomes_markup_and_nothing_is_loaded(command, checkpoint, tmp_path):
    checkpoint()
    command("mine.yaml", "checkpoint=model", "samples=6", "output=page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"script", "b", "link", "iframe", "object"})
    sources = [attrs["src"] for name, attrs in page.elements if name == "img"]
    assert len(sources) == 4  # one, two, and the one of the second source
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(key.startswith("on") or key in ("href", "srcset") for _, attrs in page.elements for key in attrs)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert text.count("<script") == 0
    assert "&lt;script&gt;alert(" in text


@pytest.mark.parametrize("template", ["llama3", "plain"])
def test_it_is_what_training_would_feed(command, tmp_path, template):
    (tmp_path / "few.yaml").write_text("sources: [{name: few, path: chats.json, image_root: images, first: 1}]")
    (tmp_path / "chats.json").write_text(json.dumps([chat("<image>\nWhat?", "A cat.", image="b.png")]))
    overrides = ("experiment=sketches_sft", "stage.start_from=null", "model.llm=null", "model.tokenizer=tokenizer")
    status, _, error = command("few.yaml", *overrides, "data.root=.", f"stage.template={template}", "output=page.html")
    assert status == 0, error
    (article,) = Page((tmp_path / "page.html").read_text(encoding="utf-8")).articles
    tokenizer = byte_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    train = compose_train(*overrides, f"stage.template={template}", "data.recipe=few.yaml", "data.root=.")
    processor = SkipVisionProcessor.from_config(model_config(train, tokenizer), tokenizer, template)
    _, dataset = open_dataset(train, processor)
    assert ids_of(article, image_id) == dataset[0].input_ids
    labels = [label for label in dataset[0].labels if label != -100]
    assert ids_of(article, image_id, marked_only=True) == labels


def compose_train(*overrides):
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=list(overrides)))


def test_tiles(command, checkpoint, tmp_path):
    reducer = ReducerConfig(split="tiles", local_keep=None, summary="none")
    checkpoint(tiling=TilingConfig("aspect", 4), reducer=reducer)
    (tmp_path / "chats.json").write_text(json.dumps([chat("<image>", "blue", image="b.png")]))
    assert command("mine.yaml", "checkpoint=model", "output=page.html")[0] == 0
    first, _ = Page((tmp_path / "page.html").read_text(encoding="utf-8")).articles
    assert "b.png: 64 x 32 became 2 x 1 tiles of 32 x 32, and a global view of 32 x 32" in first["text"]
    assert len(first["images"]) == 2


def test_seed_and_samples(command, checkpoint, tmp_path):
    checkpoint()
    (tmp_path / "chats.json").write_text(json.dumps([chat("q", f"answer {i}", id=f"id {i}") for i in range(30)]))
    pages = []
    for seed in (0, 0, 1):
        command("mine.yaml", "checkpoint=model", "samples=3", f"seed={seed}", "output=page.html")
        pages.append((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    chosen = [set(re.findall(r"id \d+", page)) for page in pages]
    assert len(chosen[0]) in (3, 4)  # and the one record of the second source
    assert chosen[0] != chosen[2]


def test_a_dry_run_says_what_the_page_would_show(command, checkpoint, tmp_path):
    checkpoint()
    entries = [chat("q", f"a {i}", id=f"id\n{i}") for i in range(8)] + [{"id": "no turns"}]
    (tmp_path / "chats.json").write_text(json.dumps(entries))
    arguments = ("mine.yaml", "checkpoint=model", "samples=4", "seed=3", "output=page.html")
    status, out, _ = command(*arguments, "--dry-run")
    *lines, last = out.splitlines()
    assert (status, last) == (0, "would write page.html: 5 samples")
    assert {path.name for path in tmp_path.glob("*.html")} | {path.name for path in tmp_path.glob("outputs")} == set()
    command(*arguments)
    shown_there = [article["text"].split() for article in Page((tmp_path / "page.html").read_text()).articles]
    assert [line.split(": ")[1].split()[:2] for line in lines if "id " in line] == [
        words[:2] for words in shown_there if words[0] == "id"
    ]
    assert all(line.startswith(("chats <script>, record ", "few, record ")) for line in lines)
    (problem,) = [line for line in command(*arguments, "samples=9", "--dry-run")[1].splitlines() if "record 8" in line]
    assert "conversations" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("checkpoint=model", "samples=0"), "samples: 0 is out of range; use 1 or more"),
        (("checkpoint=model", "output=images"), "output: images is a folder; name a file"),
        (("checkpoint=model", "data.max_length=0"), "data.max_length: 0 is out of range"),
        (("checkpoint=model", "data.resizer=best"), "data.resizer: 'best' is unknown; use auto"),
        (("checkpoint=images",), "checkpoint: images is no model directory: it has no processor_config.json"),
        ((), "name what will be trained (experiment=...), or a model (checkpoint=...)"),
        (("model.tokenizer=tokenizer", "stage.template=vicuna_v1"), "stage.template: tokenizer 'tokenizer' lacks"),
        (("model.tokenizer=tokenizer", "stage.template=vicuna"), "stage.template: "),
        (("checkpoint=model", "data.root=nowhere"), "nowhere"),
    ],
)
def test_refusals(command, checkpoint, arguments, message):
    checkpoint()
    status, _, error = command("mine.yaml", *arguments)
    assert status == 1
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error


def test_invisible_characters_are_written_out():
    assert chip_text("\n\n") == "↵↵"
    assert chip_text("  ") == "␣␣"
    assert chip_text(" a") == " a"
    assert chip_text("") == "·"
    assert chip_text("a\x00\u202eb\t") == "a⟨0000⟩⟨202E⟩b⇥"
    assert shown("a\n\tb\x1b\u2066") == "a\n\tb⟨001B⟩⟨2066⟩"
    assert shown("🏳\u200d🌈 日本") == "🏳\u200d🌈 日本"


def test_a_page_with_half_a_surrogate_pair_can_be_written():
    """File names that are no UTF-8 come with such characters, in messages and under pictures."""
    record = Record("1", "s", (), (Turn("user", "q"), Turn("assistant", "a")))
    tokens = (Token(7, "a", False, True),)
    samples = [Sample("s", "record 0", None, "bad\udcff.png: gone"), Sample("s", "record 1", record, tokens=tokens)]
    page = render_preview(PreviewInputs("t", {"recipe": "r\udc80"}, [], samples))
    page.encode("utf-8")
    assert "bad\\udcff.png" in page
