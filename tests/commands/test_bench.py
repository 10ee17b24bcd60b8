"""``skipvision bench`` on a saved model of ours and of transformers': plans by several names, equal FLOPs, refusals."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image
from tiny_vlms import make_family
from watched import make_ours

from skipvision_train import cli
from skipvision_train.commands.bench import named_plans
from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.bench_results import BenchResult
from skipvision_train.plans import skip_ffn, vskip


@pytest.fixture
def folder(tmp_path, config_factory, monkeypatch):
    """Both models, four questions about pictures, a plan."""
    model, processor = make_ours(config_factory(skip_plan=skip_ffn().bind(3).to_dict()))
    family = make_family("llava")
    for name, parts in {"ours": (model, processor), "llava": (family.model, family.processor)}.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    lines = []
    for i in range(4):
        picture = Image.effect_mandelbrot((24, 20 + i), (-2, -1.5, 1 + i, 1.5), 30).convert("RGB")
        picture.save(tmp_path / f"{i}.png")
        task = "ab"[i % 2]
        lines.append({"image": f"{i}.png", "prompt": f"w{i} w2", "answer": "w3", "task": task})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    vskip([0, 2]).bind(3).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    def run(*arguments: str, model: str = "ours") -> tuple[int, str, str]:
        fixed = ("prompts=prompts.jsonl", "output=out", "device=cpu", "max_new_tokens=3", "timing_samples=1")
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", f"checkpoint={model}", *fixed, "repeats=1", "decode_tokens=2", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


@pytest.mark.parametrize("model", ["ours", "llava"])
def test_table_json_and_pictures(command, folder, model):
    plans = "plans=[plan.json,{name: early,method: fastv,layer: 1,keep: 0.5},[{method: vskip,count: 1},skip_kv]]"
    status, out, err = command(plans, "equal_flops=[0.8]", "methods=[ffn_skip,vtw]", model=model)
    assert status == 0, err
    result = BenchResult.load(folder / "out")
    own = ["own"] if model == "ours" else []
    names = [row.name for row in result.rows]
    assert names == ["dense", *own, "plan.json", "early", "vskip count=1 + skip_kv", "ffn_skip", "vtw"]
    assert result.rows[names.index("plan.json")].plan.layers_without_attention() == (0, 2)
    assert result.rows[names.index("plan.json")].setting == "vskip"
    both = result.rows[names.index("vskip count=1 + skip_kv")].plan
    assert both.layers_without_attention() == (2,)
    assert both.evict
    assert result.rows[-2].setting.endswith("(the deepest)")
    assert {task for _, task in result.questions} == {"a", "b"}
    assert all(row.times is not None for row in result.rows)
    assert result.facts["precision"] == "float32"
    assert (folder / "out" / "bench.md").read_text() == out
    for name in ("tradeoff", "tradeoff_latency"):
        with Image.open(folder / "out" / f"{name}.png") as picture:
            assert picture.width > 500


def test_own_plan_is_not_shown_twice_and_times_can_be_left_out(command, folder):
    (folder / "out").mkdir()
    (folder / "out" / "tradeoff_latency.png").write_text("of an earlier version")
    given = ("equal_flops=[0.8,0.6]", "methods=[skip_ffn,vskip]", "timing=false")
    status, _, err = command(*given)
    assert (status, "output: out holds tradeoff_latency.png, and no bench.run.json says" in err) == (1, True)
    status, _, err = command(*given, "overwrite=true")
    assert status == 0, err
    names = [row.name for row in BenchResult.load(folder / "out").rows]
    assert names[:2] == ["dense", "own"]
    assert not any("skip_ffn" in name for name in names)
    assert not (folder / "out" / "tradeoff_latency.png").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("plans=[{count: 2}]", "plans[0]: {'count': 2} lacks 'method'"),
        ("plans=[{method: vskip, cuont: 2}]", "plans[0].cuont"),
        ("plans=[nothing]", "plans: nothing: plan.method: 'nothing' is unknown"),
        ("plans=[{method: vskip, count: 9}]", "plan.count: 9; the model has 3 layers"),
        ("plans=[[]]", "plans[0]: [] names no plan"),
        ("plans=[3]", "plans[0]: 3 is no plan"),
        ("plans=[skip_kv,skip_kv]", "plans[1]: 'skip_kv' is another row"),
        ("equal_flops=[1.2]", "equal_flops: 1.2"),
        ("methods=[fast]", "methods: 'fast' is unknown"),
        ("recipe=sketches", "recipe: give either recipe=... or prompts=..."),
        ("repeats=0", "repeats: 0; at least 1"),
        ("output=plan.json", "output: plan.json is a file"),
        ("calibration=nothing equal_flops=[0.5]", "nothing"),
    ],
)
def test_mistakes_are_one_line(command, argument, message):
    arguments = argument.split(" ") if "calibration" in argument else [argument]
    status, _, err = command("timing=false", *arguments)
    assert status == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def test_prompts_without_answers_are_refused(command, folder):
    (folder / "prompts.jsonl").write_text('{"image": "0.png", "prompt": "w1", "id": "first"}')
    status, _, err = command()
    assert status == 1
    assert "prompts.jsonl: prompt first: 'answer' is missing" in err


def test_plans_have_names():
    found = named_plans(["dense", "own", "skip_ffn", {"method": "fastv", "keep": 0.5, "layer": 2}, ["own", "a/b.json"]])
    assert found == {
        "skip_ffn": [PlanSpec("skip_ffn")],
        "fastv layer=2 keep=0.5": [PlanSpec("fastv", layer=2, keep=0.5)],
        "own + a/b.json": [PlanSpec("own"), PlanSpec("file", path="a/b.json")],
    }
    with pytest.raises(ConfigError, match="'name'"):
        named_plans([{"name": "x", "method": "skip_ffn"}, {"name": "x", "method": "skip_kv"}])
