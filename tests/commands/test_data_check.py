"""``skipvision data check`` as a user meets it: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import sys

import pytest
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from PIL import Image

from skipvision_train import cli
from skipvision_train.commands.data_check import Config, validate
from skipvision_train.config.plans import PlanSpec
from skipvision_train.config.specs import ModelSpec
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError

RECIPE = """
sources:
  - {name: chats, path: chats.json, image_root: images}
  - {name: texts, path: texts.json, max_malformed: 1}
"""


def chat(answer="yes", **extra):
    question = "<image>" if "image" in extra else ""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | extra


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / name)
    chats = [chat(image=name) for name in ("a.png", "b.png", "c.png", "gone.png")] + [chat("a" * 400)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "texts.json").write_text(json.dumps([chat("b" * 40), chat(" ")]))
    (tmp_path / "mine.yaml").write_text(RECIPE)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", "check", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


def written(tmp_path):
    folder = tmp_path / "outputs" / "data_check" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["bad.jsonl", "check.json"]
    bad = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    return json.loads((folder / "check.json").read_text()), bad


def test_within_budget(command, tmp_path):
    status, out, error = command("mine.yaml", "error_budget=1", "workers=2")
    assert status == 0
    assert "error:" not in error
    assert "\r" not in error  # no progress bar where there is no terminal
    found, bad = written(tmp_path)
    assert [(one["source"], one["index"], one["reason"]) for one in bad] == [
        ("chats", 3, "missing_image"),
        ("texts", 1, "turns"),
    ]
    assert set(bad[0]) == {"source", "index", "id", "image", "reason", "message"}
    assert found["total"] == {
        "records": 7,
        "epoch": 7,
        "bad": 2,
        "bad_in_epoch": 2,
        "text_only": 2,
        "tokens": 3 * (len("<image>yes") // 4) + 400 // 4 + 40 // 4,
        "visual_tokens": 0,
    }
    assert found["duplicates"]["all"] == {"images": 3, "places": 3, "contents": 2, "duplicates": 1}
    assert found["over_budget"] == []
    assert "4 listed, 3 found, 1 missing, 0 broken, 0 refused" in out
    assert "GPU hours" not in out
    assert "images are not counted as tokens" in out


def test_over_budget(command, tmp_path):
    status, out, error = command("mine.yaml", "workers=0")
    assert status == 1
    line = error.splitlines()[-1]
    assert line.startswith("error: mine: 1 unusable records (chats 1), error_budget is 0; ")
    assert "texts" not in line
    assert written(tmp_path)[0]["over_budget"] == ["1 unusable records (chats 1), error_budget is 0"]
    assert "mine: 7 records in an epoch" in out


def test_gpu_hours_by_hand(command, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = [f"model.text.{name}={value}" for name, value in (sizes | heads).items()]
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("max_malformed: 1", "max_malformed: 3, repeat: 3"))
    options = ("error_budget=1", "peak_tflops=100", "mfu=0.5", "backward=3")
    status, out, _ = command("mine.yaml", "model=sv_cos", "workers=0", *text, *options)
    assert status == 0
    texts = next(source for source in written(tmp_path)[0]["sources"] if source["name"] == "texts")
    tokens, width, key_width = 40 // 4, 64, 32
    layer = 4 * tokens * width * (width + key_width) + 4 * tokens**2 * width + 6 * tokens * width * 96
    forward = 2 * layer + 2 * tokens * width * 300
    assert texts["flops"] == pytest.approx(3 * 4 * forward)
    assert texts["gpu_hours"] == pytest.approx(3 * 4 * forward / (100e12 * 0.5) / 3600)
    assert "backward 3 times forward, 100 TFLOPS at an MFU of 50 %" in out


def test_images_take_what_the_model_makes_of_them(command, tmp_path):
    command("mine.yaml", "model=sv_cos", "plan=skip_ffn", "error_budget=1", "workers=0")
    found = written(tmp_path)[0]
    chats, texts = found["sources"]
    assert found["total"]["visual_tokens"] == chats["visual_tokens"] == 3 * 530
    assert chats["visual"]["values"] == {"0": 1, "530": 3}
    skipping = chats["flops"]
    command("mine.yaml", "model=sv_cos", "plan=dense", "error_budget=1", "workers=0")
    chats, dense_texts = written(tmp_path)[0]["sources"]
    assert skipping < chats["flops"]
    assert dense_texts["flops"] == texts["flops"]
    # Three images with 10 // 4 tokens of text, and 100 tokens alone, of LLaMA-3-8B; three times for the backward pass.
    sizes = ((2 + 530, 3), (100, 1))
    layer = sum(times * (4 * n * 4096 * (4096 + 1024) + 4 * n**2 * 4096 + 6 * n * 4096 * 14336) for n, times in sizes)
    head = 2 * (3 * 2 + 100) * 4096 * 128256
    images = chats["flops"] / 3 - 32 * layer - head
    block = 8 * 1025 * 1024**2 + 4 * 1025**2 * 1024 + 4 * 1025 * 1024 * 4096  # of the tower, 22 of which are read
    assert 3 * 22 * block < images < 2 * 3 * 22 * block


def test_a_checkpoint_counts_exactly(command, tmp_path, tiny_config):
    tokenizer = byte_tokenizer()
    tiny_config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processor = SkipVisionProcessor.from_config(tiny_config, tokenizer)
    tiny_config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command("mine.yaml", "checkpoint=model", "error_budget=1", "workers=0")
    found = written(tmp_path)[0]
    image = Image.new("RGB", (40, 30))
    shown = [processor.encode([Turn("user", "<image>"), Turn("assistant", "yes")], [image])] * 3
    silent = [processor.encode([Turn("user", ""), Turn("assistant", text)]) for text in ("a" * 400, "b" * 40)]
    assert found["exact"]
    assert found["total"]["tokens"] == sum(len(example.input_ids) for example in (*shown, *silent))
    chats, texts = found["sources"]
    assert (chats["supervised_tokens"], texts["supervised_tokens"]) == (
        3 * 4 + 401,
        41,
    )  # one token a byte, and the end


def test_tokenizers_and_templates_must_fit(command, tmp_path):
    assert command("mine.yaml", "model=sketches", "template=lama3")[2].startswith("error: template: ")
    assert command("mine.yaml", "checkpoint=nowhere")[2].startswith("error: checkpoint: nowhere ")
    assert not (tmp_path / "outputs").exists()


def test_what_is_missing_is_listed_at_once(command, tmp_path):
    (tmp_path / "chats.json").unlink()
    (tmp_path / "texts.json").unlink()
    status, _, error = command("mine.yaml")
    assert status == 1
    assert "2 of 2 sources are missing" in error
    assert "chats.json" in error
    assert "texts.json" in error
    assert not (tmp_path / "outputs").exists()


def test_what_cannot_be_opened_is_listed_at_once(command, tmp_path):
    (tmp_path / "chats.json").write_text("[{]")
    (tmp_path / "texts.json").write_text("[]")
    status, _, error = command("mine.yaml")
    assert status == 1
    assert "2 of 2 sources cannot be opened" in error
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": -1}, "workers: -1"),
        ({"error_budget": -1}, "error_budget: -1"),
        ({"mfu": 0.0}, "mfu: 0.0"),
        ({"mfu": 40.0}, "mfu: 40.0"),
        ({"peak_tflops": 0.0}, "peak_tflops: 0.0"),
        ({"backward": float("nan")}, "backward: nan"),
        ({"max_length": 0}, "max_length: 0"),
        ({"model": ModelSpec(), "checkpoint": "x"}, "checkpoint: x with a model"),
        ({"plan": PlanSpec("dense")}, "plan: dense of no model"),
        ({"output": __file__}, "output: "),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        validate(Config(recipe="x", **values))
    validate(Config(recipe="x"))
