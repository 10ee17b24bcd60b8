"""``skipvision analyze`` on our model, on transformers', and without any; and one clear line for what cannot be."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_vlms import make_family
from watched import make_ours

from skipvision_train import cli

PICTURES = {
    "flops_share",
    "ffn_impact",
    "similarity",
    "attention_mass",
    "attention_map",
    "attention_heads",
    "error_bound",
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty folder: status, stdout, the errors among the log lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["analyze", *arguments, "output=out"])
        out = capsys.readouterr()
        return stopped.value.code, out.out, "".join(own for own in out.err.splitlines() if own.startswith("error"))

    return run


def write_prompts(folder, words, count=3, images=True):
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (18, 20 + 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append({"id": str(i), "image": f"{i}.png", "prompt": words, "answer": "w3"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Saved tiny models of transformers, and prompts."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("llava", "qwen2_5_vl"):
        family = make_family(name)
        family.model.save_pretrained(folder / name)
        family.processor.save_pretrained(folder / name)
    write_prompts(folder, "w1 w2 w5")
    return folder


def read(tmp_path):
    return json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)


def test_our_model(command, tmp_path, tiny_config):
    tiny_config.skip_plan = None
    model, processor = make_ours(tiny_config)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_prompts(tmp_path, "what")
    arguments = ("checkpoint=model", "prompts=prompts.jsonl", "samples=2", "heads=[1,3]", "generated=3", "device=cpu")
    status, out, error = command(*arguments, "plan=skip_ffn", "visual_tokens=[64,576]")
    assert (status, error) == (0, "")
    data = read(tmp_path)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == PICTURES
    assert [own["visual_tokens"] for own in data["flops"]["shares"]] == [64, 576]
    assert set(data["ffn"]["impact"]) == {"text", "retained", "middle", "skipped", "summary"}
    assert [level["level"] for level in data["similarity"]] == ["window 8", "window 4", "window 2"]
    assert set(data["attention"]["mass_of_heads"]) == {"1", "3"}
    assert not data["attention"]["evicted"]
    assert data["bound"]["plan"] == data["plan"]["name"] == "skip_ffn"
    assert data["bound"]["theta"] is not None
    assert len(data["samples"]) == 2
    assert out.count("layer ") == 3  # tables by layer
    assert "log10 error  log10 bound" in out
    assert "measured above Eq. 10 in " in out
    assert len([row for row in out.splitlines() if row.startswith("  window")]) == 0
    assert out.count("window ") == 3

    refused, _, error = command(*arguments, "plan=skip_ffn", "parts=[attention]", "evict=true")
    assert refused == 1
    assert error.startswith("error: output: out holds results of another configuration: evict (False before, True now)")
    assert read(tmp_path) == data
    command(*arguments, "plan=skip_ffn", "parts=[attention]", "evict=true", "overwrite=true")
    again = read(tmp_path)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        name for name in PICTURES if "attention" in name
    }
    assert again["attention"]["evicted"]
    assert set(again["attention"]["mass"]["skipped"]["mean"]) == {0.0}
    assert "bound" not in again

    command(*arguments, "plan=skip_ffn", "parts=[ffn]", "dense_impact=true", "overwrite=true")
    dense = read(tmp_path)["ffn"]
    assert dense["plan"] == "dense"
    skipped, before = dense["impact"]["skipped"]["mean"], data["ffn"]["impact"]["skipped"]["mean"]
    assert skipped[0] == pytest.approx(before[0])  # nothing was skipped before the first layer
    assert abs(skipped[1] - before[1]) > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_models_of_transformers(command, others, tmp_path, name):
    status, out, error = command(
        f"checkpoint={others / name}", f"prompts={others / 'prompts.jsonl'}", "samples=3", "generated=2", "device=cpu"
    )
    assert (status, error) == (0, "")
    data = read(tmp_path)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == PICTURES
    assert set(data["ffn"]["impact"]) == {"text", "skipped"}
    assert data["ffn"]["plan"] == "dense"
    assert [level["level"] for level in data["similarity"]] == ["image features"]
    assert data["bound"]["plan"] == "skip_ffn"  # of all visual tokens, because the model's own plan skips nothing
    assert data["bound"]["kl"]["mean"] > 0
    assert data["bound"]["theta"] is None
    assert all(len(own["generated"]) == 2 for own in data["attention"]["samples"])
    assert "visual" in out.split("FFN impact")[1].splitlines()[1]
    assert "skipped" not in out.split("FFN impact")[1].splitlines()[1]


def test_flops_need_no_model(command, tmp_path):
    status, out, error = command("parts=[flops]", "geometry=llava_1_5_7b", "visual_tokens=[576]", "text_tokens=66.64")
    assert (status, error) == (0, "")
    (share,) = read(tmp_path)["flops"]["shares"]
    assert share["flops"] == pytest.approx(8.540e12, rel=1e-4)
    assert f"{100 * share['visual_ffn']:.1f} %" in out
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["flops_share.png"]


MODEL = "checkpoint=/nowhere"
REFUSED = {
    "parts: 'figures' is unknown; use some of flops, ffn,": ["parts=[ffn,figures]"],
    "parts: none": ["parts=[]"],
    "checkpoint: needs a value": ["recipe=x"],
    "checkpoint: needs a value; only parts=[flops] with geometry": ["parts=[flops]"],
    "recipe: give either recipe=... or prompts=...": [MODEL],
    "samples: 0; at least 1": [MODEL, "recipe=x", "samples=0"],
    "generated: 0; at least 1": [MODEL, "recipe=x", "generated=0"],
    "power_iterations: 0; at least 1": [MODEL, "recipe=x", "power_iterations=0"],
    "heads: [1, 1] names a head twice": [MODEL, "recipe=x", "heads=[1,1]"],
    "visual_tokens: [0.0]; numbers above 0": ["parts=[flops]", "geometry=llama3_8b", "visual_tokens=[0]"],
    "text_tokens: -1 is negative": ["parts=[flops]", "geometry=llama3_8b", "text_tokens=-1"],
    "geometry: no configuration named 'llama4'": ["parts=[flops]", "geometry=llama4"],
    "geometry.hidden_size: 0; at least 1": ["parts=[flops]", "geometry=llama3_8b", "geometry.hidden_size=0"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_cannot_work(command, message):
    status, out, error = command(*REFUSED[message])
    assert (status, out) == (1, "")
    assert error.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samples=4"], "error: samples: 4, but only 3 can be drawn"),
        (["heads=[7]"], "error: heads: 7; the model has heads 0 to 3"),
        (["plan=vskip", "plan.layers=[0]"], "error: plan: the bound is about skipped FFNs"),
        (["plan=skip_ffn", "plan.kinds=[summary]", "plan.evict=[]"], "error: plan 'skip_ffn': no_ffn of layer 0"),
    ],
)
def test_what_does_not_fit_the_model(command, others, arguments, message):
    status, _, error = command(
        f"checkpoint={others / 'llava'}", f"prompts={others / 'prompts.jsonl'}", "samples=3", "device=cpu", *arguments
    )
    assert status == 1
    assert error.startswith(message)


def test_records_without_images_and_models_without_eyes(command, others, tmp_path):
    record = {"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "text.json").write_text(json.dumps([record]))
    (tmp_path / "text.yaml").write_text("sources:\n  - name: text\n    path: text.json\n    image_root: .\n")
    status, _, error = command(f"checkpoint={others / 'llava'}", "recipe=text.yaml", "device=cpu")
    assert status == 1
    assert error.startswith("error: recipe: none of the 1 records of text.yaml shows an image")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    status, _, error = command("checkpoint=llm", f"prompts={others / 'prompts.jsonl'}", "samples=1")
    assert status == 1
    assert error.startswith("error: checkpoint: llm holds a model of text (llama), which sees no images")
