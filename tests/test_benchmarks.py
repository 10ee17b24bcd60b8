"""The benchmark scripts, end to end in a tiny geometry: what they print, not how long it took."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_flops import total

from skipvision_train.errors import PlanError
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, TilingConfig
from skipvision_train.plans import skip_ffn, vskip

TINY = ["--geometry", "small", "--layers", "4", "--width", "128", "--text", "40", "--device", "cpu", "--dtype", "fp32"]
WIDTH, FFN, TEXT, DEPTH = 128, 344, 40, 4


@pytest.fixture(scope="module")
def scripts(pytestconfig: pytest.Config) -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/``, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
        import decode
        import harness
        import prefill
        import step_flops
        import train_models
        import train_step

        yield SimpleNamespace(
            decode=decode,
            prefill=prefill,
            harness=harness,
            step_flops=step_flops,
            train_models=train_models,
            train_step=train_step,
        )


def run(script: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[str], list[dict]]:
    """The lines before the last, and the results that the last line holds."""
    script.main([*TINY, "--repeats", "2", *options])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def cells(lines: list[str], case: str) -> list[list[str]]:
    """The cells of every table line of a case, its name first."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in split if row[0] == case]


def layer_flops(visual: int, queries: int, pairs: float, ffn_rows: int) -> float:
    """One layer of the tiny model: Q and O of ``queries``, K and V of all, attention of ``pairs``, FFN of its rows."""
    return 4 * (visual + TEXT) * WIDTH**2 + 4 * queries * WIDTH**2 + 4 * pairs * WIDTH + 6 * ffn_rows * WIDTH * FFN


def test_prefill_prints_a_table_per_setting_and_ends_with_json(scripts, capsys, tmp_path):
    file = tmp_path / "results.json"
    lines, results = run(scripts.prefill, capsys, "--visual", "12", "20", "--batch", "1", "2", "--json", str(file))
    names = ["dense", *(case.name for case in scripts.prefill.CASES)]
    settings = [(12, 1), (12, 2), (20, 1), (20, 2)]
    assert [(r["visual"], r["batch"], r["case"]) for r in results] == [(*s, name) for s in settings for name in names]
    assert [len(cells(lines, name)) for name in names] == [4] * len(names)
    written = json.loads(file.read_text())
    assert written["results"] == results
    for field in ("command", "hardware", "threads", "versions", "commit", "model", "dtype", "attention", "rounds"):
        assert f"{field}: {written['header'][field]}" in lines
    for row in (r for r in results if r["refused"] is None):
        assert row["ms"] > 0
        if row["flops_ratio"] == 1:
            assert row["realised"] is None
        else:
            assert row["realised"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["flops_ratio"]))
    refused = {r["case"] for r in results if r["refused"] is not None}
    assert not refused


def test_prefill_counts_flops_as_a_causal_kernel_computes_them(scripts, capsys):
    lines, results = run(scripts.prefill, capsys, "--visual", "12", "--plans", "vskip", "ffn", "shortv", "vtw", "att")
    ratio = {row["case"]: row["flops_ratio"] for row in results}
    total = TEXT + 12
    everything = layer_flops(12, total, total * (total + 1) / 2, total)
    text_pairs = 35 * 36 / 2 + sum(range(48, 53))  # 35 text tokens, 12 visual ones that do not ask, 5 text tokens
    quiet = layer_flops(12, TEXT, text_pairs, total)
    no_ffn = layer_flops(12, total, total * (total + 1) / 2, TEXT)
    half_ffn = layer_flops(12, total, total * (total + 1) / 2, TEXT + 6)
    text_only = layer_flops(0, TEXT, TEXT * (TEXT + 1) / 2, TEXT)
    assert ratio["dense, attached"] == 1
    assert ratio["vskip 1/2, zero"] == pytest.approx((2 * everything + 2 * quiet) / (4 * everything))
    assert ratio["vskip 19/32, norm"] == pytest.approx((2 * everything + 2 * quiet) / (4 * everything))
    assert ratio["ffn_skip 19/32"] == pytest.approx((2 * everything + 2 * no_ffn) / (4 * everything))
    assert ratio["skip_ffn"] == pytest.approx(half_ffn / everything)
    assert ratio["vtw"] == pytest.approx((2 * everything + 2 * text_only) / (4 * everything))
    assert cells(lines, "vtw")[0][4] == f"{ratio['vtw']:.3f}"


def test_a_refused_plan_is_a_line_of_the_table(scripts, capsys, monkeypatch):
    harness = scripts.harness
    impossible = harness.Case("too deep", lambda depth: vskip([depth]))
    monkeypatch.setattr(scripts.prefill, "CASES", (impossible, *scripts.prefill.CASES[:1]))
    lines, results = run(scripts.prefill, capsys, "--visual", "12")
    reason = "vskip: layers [4] do not exist; the model has layers 0 to 3"
    assert [row["refused"] for row in results] == [None, reason, None]
    assert results[1].keys() == results[0].keys()
    assert results[1]["time_ratio"] is None
    assert cells(lines, "too deep")[0][1] == f"refused: {reason}"


def test_decode_measures_the_cache_against_what_it_should_be(scripts, capsys):
    lines, results = run(
        scripts.decode, capsys, "--visual", "12", "--steps", "2", "--batch", "1", "2", "--clock", "cpu"
    )
    names = ["dense", *(case.name for case in scripts.decode.CASES)]
    assert [row["case"] for row in results] == names * 2
    prompt = TEXT + 12 + 2  # of the 12, 3 are retained, 3 middle and 6 skipped; 2 summary tokens stand among them
    held = {
        "dense": prompt,
        "skip_ffn, nothing evicted": prompt,
        "skip_ffn, small evicted": prompt - 6,
        "skip_ffn, middle + small evicted": prompt - 9,
        "skip_ffn, all but summary evicted": prompt - 12,
        "vtw": prompt - 12 / 2,
        "fastv": prompt - 6 * 3 / 4,
    }
    for row in results:
        assert row["refused"] is None
        token = 2 * DEPTH * WIDTH * 4 * row["batch"]
        assert row["cache_bytes"] == row["expected_bytes"] == held[row["case"]] * token
        assert row["cache_ratio"] == pytest.approx(held[row["case"]] / prompt)
    assert [row[-1] for row in cells(lines, "skip_ffn, small evicted")] == ["0.889"] * 2


def test_every_round_begins_with_another_case_and_warm_up_is_not_measured(scripts):
    harness, order = scripts.harness, []

    def step(name: str) -> object:
        order.append(name)
        if name == "b" and order.count("b") == 2:
            raise PlanError("no more")
        return harness.Sample(float(len(order)))

    runs = {name: (lambda name=name: step(name)) for name in "abc"}
    samples, refused = harness.interleave(runs, repeats=2, warmup=1)
    assert "".join(order) == "abc" + "bca" + "ca"
    assert refused == {"b": "no more"}
    assert {name: [s.seconds for s in taken] for name, taken in samples.items()} == {"a": [6, 8], "c": [5, 7]}


def test_a_run_that_is_ended_leaves_what_it_has_measured(scripts, capsys):
    """On request; nothing is printed else."""
    samples = iter([scripts.harness.Sample(0.25), scripts.harness.Sample(0.5), scripts.harness.Sample(2.0)])
    runs = {"a": lambda: next(samples)}
    with pytest.raises(StopIteration):
        scripts.harness.interleave(runs, repeats=3, warmup=1, unit="step")
    assert capsys.readouterr().out.splitlines() == [
        "warm-up, a: 250.00 ms per step",
        "round 1, a: 500.00 ms per step",
        "round 2, a: 2000.00 ms per step",
    ]
    scripts.harness.interleave({"a": lambda: scripts.harness.Sample(1.0)}, repeats=1, warmup=0)
    assert capsys.readouterr().out == ""


def test_ratios_are_taken_round_by_round(scripts):
    sample = scripts.harness.Sample
    base = [sample(s) for s in (1.0, 2.0, 4.0, 1.0, 1.0)]
    own = [sample(s) for s in (0.5, 1.2, 2.8, 0.8, 0.9)]
    found = scripts.harness.compare(own, base, flops_ratio=0.4)
    assert found["time_ratio"] == pytest.approx(0.7)
    assert found["spread"] == pytest.approx(0.1)
    assert found["realised"] == pytest.approx(0.5)
    assert found["ms"] == pytest.approx(900)
    assert scripts.harness.compare(own, base, flops_ratio=1.0)["realised"] is None


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [((8, 16, 24), 32, (8, 16, 24)), ((8, 16, 24), 12, (3, 6, 9)), ((2, 6, 15), 4, (1, 2, 3)), ((3,), 40, (4,))],
)
def test_places_keep_the_papers_proportions(scripts, layers, depth, expected):
    assert scripts.harness.places(layers, depth) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--width", "100"], "needs a positive multiple of 128"),
        (["--text", "35"], "more than 35 are needed"),
        (["--retained", "1.5"], "a share from 0 to 1"),
        (["--repeats", "0"], "at least 1"),
        (["--clock", "cpu", "--device", "cuda"], "sees one thread of the processor"),
    ],
)
def test_sizes_that_cannot_be_are_refused(scripts, capsys, options, complaint):
    with pytest.raises(SystemExit):
        scripts.prefill.main([*TINY, *options])
    assert complaint in capsys.readouterr().err


def test_a_filter_that_matches_nothing_names_the_cases(scripts):
    with pytest.raises(SystemExit, match=r"--plans vskipp: no such case; there are dense, attached; vskip 1/2, zero"):
        scripts.prefill.main([*TINY, "--plans", "vskipp"])


TINY_STEP = ("--device", "cpu", "--width", "256", "--layers", "1", "--repeats", "1", "--warmup", "0")


def test_train_step_prints_both_parts_of_every_setting_and_ends_with_json(scripts, capsys, tmp_path):
    file = tmp_path / "results.json"
    scripts.train_step.main([*TINY_STEP, "--settings", "llava,cos", "--batch", "2", "1", "--json", str(file)])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert json.loads(file.read_text())["results"] == results
    cases = [("llava", 2, "llava"), ("llava", 2, "sv_llava"), ("cos", 1, "cos_dense"), ("cos", 1, "sv_cos")]
    expected = [(*case, part) for pair in (cases[:2], cases[2:]) for part in ("step", "decoder") for case in pair]
    assert [(r["setting"], r["batch"], r["case"], r["part"]) for r in results] == expected
    assert [r["tokens"] for r in results[::4]] == [[128 + 576, 128 + 258], [128 + 1296, 128 + 530]]
    for row in results:
        assert len(cells(lines, row["case"])) == 2
        assert row["peak_bytes"] is row["mfu"] is None
        if row["case"] in ("llava", "cos_dense"):
            assert (row["time_ratio"], row["flops_ratio"], row["realised"]) == (1, 1, None)
        else:
            assert row["realised"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["flops_ratio"]))
        if row["part"] == "step":
            assert 0 < row["optimizer_ms"] < row["ms"]
            assert row["flops_per_row"] == sum(row["flops_of"].values())
    # One layer of width 256, FFN 896, 4 query heads on 1 key head: Q, O, K, V; causal attention; the FFN of its tokens.
    n, ffn = 128 + 530, 128 + 275
    decoder = 3 * (n * 5 * 256**2 + 2 * n * (n + 1) * 256 + 6 * ffn * 256 * 896)
    assert results[7]["flops_per_row"] == results[5]["flops_of"]["decoder"] == decoder
    assert results[7]["paper_ratio"] == pytest.approx(0.226, abs=5e-4)


DENSE, PLAN = ReducerConfig.off(), skip_ffn().bind(3).to_dict()
TILES = {
    "connector": MlpConfig(),
    "tiling": TilingConfig("square", max_tiles=4),
    "reducer": ReducerConfig(split="tiles", local_keep=40, merge_rounds=2, former_over="retained"),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "trains_vision", "checkpointing", "summarised"),
    [
        ({"reducer": DENSE}, True, False, 0),
        ({"skip_plan": PLAN}, True, False, 4 + 6),
        ({"skip_plan": PLAN, **TILES}, False, False, 64 + 40),
        ({"skip_plan": PLAN, **TILES}, True, False, 64 + 40),
        ({"reducer": DENSE}, True, True, 0),
    ],
    ids=["dense", "skipping", "frozen tower, tiles", "tiles", "checkpointing"],
)
def test_step_flops_agree_with_the_counter_of_torch(
    scripts, config_factory, changes, trains_vision, checkpointing, summarised
):
    if "tiling" in changes:
        changes = changes | {"vision": replace(config_factory().vision_config, depths=(2,))}
    config = config_factory(**changes)
    row = scripts.step_flops.Row(text=40, supervised=3, tiles=config.tiling_config.counts[-1])
    model = SkipVisionForConditionalGeneration(config).train()
    model.vision_tower.requires_grad_(trains_vision)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = scripts.train_models.make_batch(config, row, 1, "cpu")
    # Fused kernels for the CPU are unknown to the counter; the plain one computes attention in full.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    expected = scripts.step_flops.step_flops(config, row, trains_vision, checkpointing, causal=False).total
    expected += 3 * 2 * 2 * summarised * 32  # summary tokens: scores and sums
    if checkpointing:  # torch stops recomputing before the last product: down_proj, and c_proj of the tower's blocks
        expected -= 3 * 2 * (40 + 22) * 48 * 32 + 2 * 2 * 65 * 64 * 32
    assert total(counter) == expected


def make_pair(scripts, *options):
    args = scripts.train_step.parse([*TINY_STEP, "--settings", "llava", *options])
    whole, skip = scripts.train_models.make_pair(args, "llava", rows=1)
    return whole, skip, scripts.train_models.Trainer(args, skip)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16", "bf16_states"])
def test_both_arrangements_train_the_same_weights(scripts, precision):
    whole, skip, trainer = make_pair(scripts, "--precision", precision, "--accumulation", "2")
    own, shared = dict(skip.model.named_parameters()), dict(whole.model.named_parameters())
    assert set(own) - set(shared) == {name for name in own if name.startswith("reducer.")}
    assert all(own[name] is shared[name] for name in shared)
    assert {weight.dtype for weight in own.values()} == {
        torch.bfloat16 if precision.startswith("bf16") else torch.float32
    }
    for arrangement, parts in (
        (whole, {"connector", "language_model"}),
        (skip, {"connector", "language_model", "reducer"}),
    ):
        before = copy.deepcopy({name: weight.detach() for name, weight in own.items()})
        sample = trainer.step(arrangement)
        assert 0 < sample.optimizer_seconds < sample.seconds
        moved = {name.partition(".")[0] for name, weight in own.items() if not torch.equal(weight, before[name])}
        assert moved == parts
        assert skip.model.plan.is_dense
        assert all(weight.grad is None for weight in own.values())


def test_saved_bytes_are_what_the_backward_pass_reads(scripts):
    whole, skip, trainer = make_pair(scripts)
    one, two = (
        trainer.saved_bytes(skip),
        trainer.saved_bytes(replace(skip, batch=scripts.train_models.make_batch(skip.config, skip.row, 2, "cpu"))),
    )
    # Weights are left out, so that twice the rows are twice the bytes but for a few index tensors and rotary angles.
    assert two == pytest.approx(2 * one, rel=0.02)
    # The FFN keeps its input's norm, gate, up, silu(gate) and their product for every one of its tokens at least.
    assert one > 4 * (128 + 102) * (2 * 256 + 4 * 896)
    assert trainer.saved_bytes(whole) > 1.5 * one


def test_master_weights_are_those_of_adamw_in_fp32(scripts, monkeypatch):
    monkeypatch.setattr(scripts.train_models, "BUCKET", 12)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in (8, 4, 16, 3)]
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    group = {"name": "llm", "lr": 1e-3, "weight_decay": 0.1}
    masters = scripts.train_models.MasterAdamW([{**group, "params": weights}], fused=False)
    assert [len(bucket) for bucket, *_ in masters.buckets] == [2, 1, 1]
    reference = torch.optim.AdamW([{**group, "params": exact}])
    for step in range(20):
        for weight, other in zip(weights, exact, strict=True):
            # A weight that gets no gradient in a step stays, its moments too.
            weight.grad = None if step % 3 == 0 and weight.numel() == 4 else torch.randn(weight.shape).bfloat16()
            other.grad = None if weight.grad is None else weight.grad.float()
        masters.step()
        reference.step()
        assert all(torch.equal(w, e.bfloat16()) for w, e in zip(weights, exact, strict=True))


def test_the_peak_is_known_for_named_devices_only(scripts):
    peak = scripts.step_flops.peak_flops
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA H100 PCIe") is peak("NVIDIA GH200 480GB") is peak("NVIDIA L4") is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--settings", "llava,cosmos"], "'cosmos' is unknown; use cos,llava,llava_hd or some of them"),
        (["--part", "tower"], "'tower' is unknown; use step,decoder or some of them"),
        (["--width", "384"], "a positive multiple of 256 is needed"),
        (["--batch", "1", "2"], "2 numbers for 3 settings"),
        (["--accumulation", "0"], "at least 1 is needed"),
        (["--text", "90"], "1 to 55 stand behind the image"),
    ],
)
def test_steps_that_cannot_be_are_refused(scripts, capsys, options, complaint):
    with pytest.raises(SystemExit):
        scripts.train_step.parse(["--device", "cpu", *options])
    assert complaint in capsys.readouterr().err
