"""``skipvision flops``: the figures of the papers from the command line, and one clear line for what cannot be."""

from __future__ import annotations

import json
import sys

import pytest

from skipvision_train import cli
from skipvision_train.analysis.geometry import geometry_names, load_geometry, text_config
from skipvision_train.config.plans import FIELDS, PlanSpec, build_plan
from skipvision_train.config.specs import TextSpec
from skipvision_train.errors import ConfigError
from skipvision_train.plans import SkipPlan, TokenKind, fastv, ffn_skip, preset, skip_ffn, sparsevlm, vskip, vtw
from skipvision_train.plans.presets import MODELS
from skipvision_train.resources import resource_dir

LLAVA = ("geometry=llava_1_5_7b", "visual_tokens=576", "text_tokens=66.64")
PAPER = ("geometry=llama3_8b", "formula=skip_vision")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["flops", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out, out.err

    return run


@pytest.fixture
def result(command):
    """The JSON object that the command prints."""

    def run(*arguments: str) -> dict:
        status, out, error = command(*arguments, "format=json")
        assert (status, error) == (0, "")
        return json.loads(out)

    return run


@pytest.mark.parametrize(
    ("plan", "printed"),
    [
        (("plan=dense",), "8.540"),
        (("plan=vskip", "plan.count=19"), "7.690"),
        (("plan=shortv", "plan.published=true"), "4.730"),
        (("plan=ffn_skip", "plan.layers=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18]"), "5.58"),
        (("plan=vtw", "plan.layer=16"), "4.703"),
        (("plan=vtw", "plan.published=true"), "4.703"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_figures_of_v_skip(result, plan, printed):
    found = result(*LLAVA, *plan)
    assert f"{found['plan_tflops']:.{len(printed) - 2}f}" == printed
    assert f"{found['dense_tflops']:.3f}" == "8.540"
    assert found["ratio"] == pytest.approx(found["plan_tflops"] / found["dense_tflops"])
    assert found["formula"].startswith("2 FLOPs per multiply-add")
    work = found["prefill_tflops"]["plan"]
    assert sum(work.values()) == pytest.approx(found["plan_tflops"])
    assert set(work) == {"projections", "attention", "ffn", "score"}


@pytest.mark.parametrize(
    ("arguments", "percent"),
    [
        (("plan=skip_ffn", "visual_tokens=256", "skipped_tokens=156", "summary_tokens=2"), "25.1"),
        (("plan=skip_ffn", "visual_tokens=572", "skipped_tokens=316"), "60.3"),
        (("visual_tokens=256",), "44.0"),
        (("visual_tokens=144",), "24.6"),
        (("visual_tokens=576", "plan=fastv", "plan.layer=2", "plan.keep=144"), "29.4"),
    ],
    ids=["SV-LLaVA 100/156", "SV-LLaVA 256/316", "MQT", "TokenPacker", "FastV"],
)
def test_rows_of_skip_vision(result, arguments, percent):
    found = result(*PAPER, *arguments, "dense_visual_tokens=576")
    assert f"{100 * found['ratio']:.1f}" == percent
    assert found["formula"].startswith("Skip-Vision: 4 N1 C^2")


def test_split_of_the_visual_tokens(result):
    split = ("visual_tokens=528", "skipped_tokens=255", "middle_tokens=256", "summary_tokens=2", "text_tokens=40")
    found = result("geometry=llama3_8b", "plan=skip_kv", "plan.level='middle + small'", *split)
    counts = {"text": 40, "retained": 17, "middle": 256, "skipped": 255, "summary": 2}
    assert found["tokens"] == {"plan": counts, "dense": {"text": 40, "retained": 528}}
    assert found["kv_cache_bytes"]["plan"] == (40 + 17 + 2) * 32 * 2 * 1024 * 2
    assert result("visual_tokens=5")["tokens"]["plan"] == {"text": 66.64, "skipped": 5}


def test_registers_are_tokens_of_the_plan_alone(result):
    found = result("plan=victor", "plan.registers=16")
    assert found["tokens"]["plan"]["summary"] == 16
    assert "summary" not in found["tokens"]["dense"]


def test_what_can_be_added(result):
    bare, added = result(), result("vision_tower=true", "views=3", "lm_head=true")
    tower = added["prefill_tflops"]["dense"]["vision_tower"] / 3
    # 23 blocks of width 1,024 over 577 tokens, and the patch embedding.
    block = 577 * 24 * 1024**2 + 4 * 577**2 * 1024
    assert tower * 1e12 == pytest.approx(23 * block + 2 * 576 * 3 * 14**2 * 1024)
    head = 2 * 4096 * 32064
    assert added["dense_tflops"] - bare["dense_tflops"] == pytest.approx(3 * tower + head / 1e12)
    assert added["decode_gflops"]["plan"] - bare["decode_gflops"]["plan"] == pytest.approx(head / 1e9)


def test_causal_attention_is_about_half(result):
    full, causal = (result(f"attention={name}")["prefill_tflops"]["dense"] for name in ("full", "causal"))
    n = 576 + 66.64
    assert causal["attention"] / full["attention"] == pytest.approx((n + 1) / (2 * n))
    late, early = (result("attention=causal", "plan=vskip", "plan.count=32", f"text_before={n}") for n in (60, 20))
    assert late["plan_tflops"] < early["plan_tflops"]


def test_asking_tokens_rank(result):
    few, all_of_them = result("plan=sparsevlm", "asking_tokens=10"), result("plan=sparsevlm")
    assert few["prefill_tflops"]["plan"]["score"] < all_of_them["prefill_tflops"]["plan"]["score"]
    assert few["prefill_tflops"]["dense"]["score"] == 0


def test_formula_of_v_skip_knows_no_grouped_queries(result):
    sizes = "geometry=llama3_8b"
    exact, paper = result(sizes), result(sizes, "formula=v_skip")
    n, h = 576 + 66.64, 4096
    assert paper["dense_tflops"] - exact["dense_tflops"] == pytest.approx(32 * 2 * 2 * n * h * (h - 1024) / 1e12)


def test_table(command):
    status, out, error = command(*LLAVA, "plan=vskip", "plan.count=19")
    assert (status, error) == (0, "")
    assert "layers: the deepest 19 of 32" in out
    lines = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    assert lines["total"] == ["8.5400", "7.6903", "90.1", "%"]
    assert lines["score"] == ["0.0000", "0.0000"]
    assert {"projections", "attention", "ffn", "decode, GFLOPs per token", "KV cache, MB in 16 bits"} <= set(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan=vskp",), "plan: no configuration named 'vskp'; did you mean 'vskip'"),
        (("plan.method=nothing",), "plan.method: 'nothing' is unknown; use own, dense, "),
        (("plan=vskip",), "plan.layers: vskip needs exactly one of plan.layers=[...] or plan.count=N"),
        (("plan=vskip", "plan.layers=[1]", "plan.count=1"), "plan.layers: vskip needs exactly one of"),
        (("plan=vskip", "plan.layers=[3,40]"), "plan: vskip: layers [40] do not exist; the model has layers 0 to 31"),
        (("plan=vskip", "plan.count=33"), "plan.count: 33; the model has 32 layers, use 0 to 32"),
        (("plan=vtw", "plan.layer=99"), "plan: vtw: layers [99] do not exist"),
        (("plan=vtw", "plan.count=3"), "plan.count: vtw does not read it; it reads plan.layer, "),
        (("plan=vtw", "plan.kinds=[words]"), "plan.kinds: 'words' is no token kind"),
        (("plan=fastv", "plan.keep=[0.5]"), "plan.keep: [0.5]; fastv needs one number"),
        (("plan=pyramiddrop", "plan.keep=0.5"), "plan.keep: 0.5; pyramiddrop needs a list"),
        (("plan=fastv", "plan.keep=half"), "plan: drop.keep: 'half' is neither a number"),
        (("plan=vtw", "plan.published=true", "plan.layer=3"), "plan.published: true with plan.layer"),
        (("plan=shortv", "plan.published=true", "geometry=llama3_8b"), "plan: preset: model 'llama3_8b' is unknown"),
        (("plan=file",), "plan.path: needs a value; give "),
        (("plan=file", "plan.path=none.json"), "plan: none.json: no such plan file"),
        (("geometry=llava",), "geometry: no configuration named 'llava'"),
        (("geometry.hidden_size=0",), "geometry.hidden_size: 0; at least 1"),
        (("geometry.num_key_value_heads=5",), "geometry.num_key_value_heads: 5 does not divide"),
        (
            ("geometry.num_attention_heads=48", "geometry.num_key_value_heads=4"),
            "geometry.num_attention_heads: 48 does",
        ),
        (("geometry.model_type=lama",), "geometry.model_type: 'lama' is unknown to transformers"),
        (
            ("geometry.num_attention_heads=48", "geometry.num_key_value_heads=4", "geometry.head_dim=64"),
            "geometry: no llama",
        ),
        (("geometry=qwen2_5_vl_7b", "vision_tower=true"), "geometry.vision: qwen2_5_vl_7b names no CLIP tower"),
        (("visual_tokens=-1",), "visual_tokens: -1.0 is out of range"),
        (("text_tokens=nan",), "text_tokens: nan is out of range"),
        (("skipped_tokens=600",), "visual_tokens: 576 are fewer than the 600 of skipped_tokens and middle_tokens"),
        (("asking_tokens=70",), "asking_tokens: 70 are more than text_tokens 66.64"),
        (("visual_tokens=0", "text_tokens=0"), "visual_tokens: the dense model has no tokens"),
        (("attention=half",), "attention: 'half' is unknown; use full, causal"),
        (("formula=mine",), "formula: 'mine' is unknown; use exact, v_skip, skip_vision"),
        (("format=xml",), "format: 'xml' is unknown; use table, json"),
        (("formula=v_skip", "attention=causal"), "attention: causal with formula v_skip"),
        (("formula=skip_vision", "lm_head=true"), "lm_head: true with formula skip_vision"),
        (("formula=skip_vision", "plan=vskip", "plan.count=1"), "formula: plan 'vskip': Skip-Vision's formula has one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(command, arguments, message):
    status, out, error = command(*arguments)
    assert error.startswith(f"error: {message}")
    assert (status, out, error.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({"method": "skip_ffn", "evict": []}, skip_ffn(evict=())),
        ({"method": "skip_ffn", "kinds": ["middle"], "evict_when": "before_first_token"}, None),
        ({"method": "vskip", "layers": [2, 5], "bypass": "norm"}, vskip([2, 5], "norm")),
        ({"method": "ffn_skip", "count": 3}, ffn_skip([29, 30, 31])),
        ({"method": "vtw"}, vtw()),
        ({"method": "vtw", "kinds": ["skipped"]}, vtw(kinds=frozenset({TokenKind.SKIPPED}))),
        ({"method": "fastv", "keep": 1}, fastv(keep=1)),
        ({"method": "fastv", "keep": 1.0, "layer": 2}, fastv(2, 1.0)),
        ({"method": "sparsevlm", "version": 2, "layers": [1], "keep": [7]}, sparsevlm(192, 2, [1], [7])),
    ],
)
def test_specs_become_the_builders_plans(fields, plan):
    expected = skip_ffn(["middle"], ["skipped"], "before_first_token") if plan is None else plan
    assert build_plan(PlanSpec(**fields), 32) == expected.bind(32)


def test_only_a_count_is_noted_in_the_plan():
    assert build_plan(PlanSpec("vskip", count=2), 4).provenance["layers"].startswith("the deepest 2 of 4")
    assert build_plan(PlanSpec("vskip", layers=[2, 3]), 4).provenance == {}


@pytest.mark.parametrize("model", MODELS)
def test_published_plans(model):
    spec, depth = PlanSpec("vtw", published=True), load_geometry(model).num_hidden_layers
    assert build_plan(spec, depth, model) == preset("vtw", model).bind(depth)
    with pytest.raises(ConfigError, match=r"plan\.published: the model has no name"):
        build_plan(spec, depth)


def test_a_plan_file_comes_back(tmp_path):
    plan = fastv(2, 7).bind(6)
    plan.save(tmp_path / "plan.json")
    assert build_plan(PlanSpec("file", path=str(tmp_path / "plan.json")), 6) == plan
    with pytest.raises(ConfigError, match="has 6 layers, the model has 8"):
        build_plan(PlanSpec("file", path=str(tmp_path / "plan.json")), 8)


def test_every_method_has_its_file_and_builds():
    assert {path.stem for path in (resource_dir("conf") / "plan").glob("*.yaml")} == set(FIELDS)
    needed = {name: {"count": 4} for name in ("vskip", "ffn_skip", "shortv")}
    for method in set(FIELDS) - {"file", "own", "bank"}:
        assert isinstance(build_plan(PlanSpec(method, **needed.get(method, {})), 32), SkipPlan)


SIZES = {  # vocabulary, hidden, FFN, layers, heads, key-value heads: of the models' own config.json
    "llava_1_5_7b": (32064, 4096, 11008, 32, 32, 32),
    "llava_1_5_13b": (32064, 5120, 13824, 40, 40, 40),
    "llava_next_7b": (32064, 4096, 11008, 32, 32, 32),
    "llava_next_13b": (32064, 5120, 13824, 40, 40, 40),
    "qwen2_5_vl_7b": (152064, 3584, 18944, 28, 28, 4),
    "llama3_8b": (128256, 4096, 14336, 32, 32, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_geometries(name):
    geometry = load_geometry(name)
    assert geometry.name == name
    names = [f"{part}_size" for part in ("vocab", "hidden", "intermediate")]
    names += [f"num_{part}" for part in ("hidden_layers", "attention_heads", "key_value_heads")]
    config = text_config(geometry)
    assert tuple(getattr(config, field) for field in names) == SIZES[name]
    assert (geometry.vision is None) == (name == "qwen2_5_vl_7b")


def test_geometries_are_all_listed_and_serve_the_presets():
    assert geometry_names() == sorted(SIZES)
    assert set(MODELS) <= set(SIZES)
    with pytest.raises(ConfigError, match="geometry: 'gpt2' is unknown; use llama3_8b, "):
        load_geometry("gpt2")


def test_llama3_is_what_training_assumes():
    geometry, text = vars(load_geometry("llama3_8b")), vars(TextSpec())
    assert {k: geometry[k] for k in geometry if k in text} == {k: text[k] for k in text if k in geometry}


def test_head_width_of_its_own(result):
    """Half as wide heads halve what depends on their width."""
    narrow, wide = result("geometry.model_type=qwen3", "geometry.head_dim=64"), result()
    for work in ("projections", "attention"):
        assert narrow["prefill_tflops"]["dense"][work] == wide["prefill_tflops"]["dense"][work] / 2
