"""The benchmark of training against transformers' trainer, in a tiny geometry: what it compares and prints."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType

import pytest

TINY = ["--geometry", "tiny", "--device", "cpu", "--records", "12", "--repeats", "1", "--warmup", "0"]


@pytest.fixture
def bench(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import training

    return training


def test_every_saving_is_switched_off_once(bench, capsys):
    """With workers, as on a GPU: what they count stays with them."""
    bench.main([*TINY, "--workers", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["case"]: row for row in json.loads(last)}
    assert [line.partition(":")[0] for line in lines if line.startswith("round")] == [f"round 1, {row}" for row in rows]
    assert list(rows) == ["transformers", "ours", *(f"ours without {name}" for name in bench.WITHOUT)]
    base = rows["transformers"]["samples_per_second"]
    assert rows["transformers"]["times_transformers"] == rows["ours"]["time_of_ours"] == 1
    for row in rows.values():
        assert row["times_transformers"] == pytest.approx(row["samples_per_second"] / base, rel=0.01)


def test_all_logits_give_the_same_loss(bench, tmp_path):
    """What is switched off for the comparison changes no loss."""
    args = bench.options(TINY)
    bench.write_workspace(tmp_path, bench.SIZES["tiny"], 40)
    losses = []
    for without in (None, *bench.WITHOUT[1:]):
        case = bench.Ours(args, tmp_path, without)
        case.run()
        losses.append(case.losses)
    assert len(losses[0]) > 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_cases_share_one_model_and_leave_it_as_it_was(bench, tmp_path):
    """A GPU has no room for five; what one case puts around the model's methods must not reach the next."""
    args = bench.options(TINY)
    bench.write_workspace(tmp_path, bench.SIZES["tiny"], 12)
    ours = bench.Ours(args, tmp_path, None)
    model, first = ours.parts.model, bench.Ours(args, tmp_path, bench.WITHOUT[1], ours.parts.model)
    assert first.parts.model is model
    first.run()
    assert model._loss.__func__ is bench.loss_of_all_logits
    model.forward = None  # as accelerate wraps it under bf16
    bench.clean(model)
    assert model._loss.__func__ is type(model)._loss
    assert model.forward.__func__ is type(model).forward
    last = bench.Ours(args, tmp_path, bench.WITHOUT[2], model)
    last.run()
    assert not model._read_supervised
    bench.Bare(ours).run()
    ours.run()
    assert model._read_supervised


def test_records_that_transformers_trains_on_are_counted(bench, tmp_path):
    """Seven batches of two, in steps of two batches; the last record is dropped."""
    args = bench.options(TINY)
    bench.write_workspace(tmp_path, bench.SIZES["tiny"], 15)
    theirs, seen = bench.Theirs(args, bench.Ours(args, tmp_path, bench.WITHOUT[0]), tmp_path), []
    theirs.model.register_forward_hook(
        lambda model, given, kwargs, out: seen.append(len(kwargs["labels"])), with_kwargs=True
    )
    theirs.run()
    assert theirs.records == sum(seen) == 14


def test_long_texts_are_cut(bench, tmp_path):
    sizes = replace(bench.SIZES["tiny"], median=200)
    bench.write_workspace(tmp_path, sizes, 30)
    records = json.loads((tmp_path / "data.json").read_text())
    lengths = [sum(len(turn["value"].removeprefix("<image>\n")) for turn in r["conversations"]) for r in records]
    assert max(lengths) == sizes.longest
    assert sum(length < sizes.longest for length in lengths) > 10


def test_the_bare_loop_brings_the_layout_from_the_cpu(bench, tmp_path, monkeypatch):
    """Made from tensors on a GPU, it would make the host wait."""
    args = bench.options(TINY)
    bench.write_workspace(tmp_path, bench.SIZES["tiny"], 12)
    ours, seen = bench.Ours(args, tmp_path, None), []
    ours.parts.model.register_forward_pre_hook(lambda model, given, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    bench.Bare(ours).run()
    assert seen
    assert all("token_layout" in keys and not keys & {"token_kinds", "document_ids"} for keys in seen)


def test_the_loop_against_a_bare_one(bench, capsys):
    bench.main([*TINY, "--loop"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["case"] == "overhead"
    assert row["step_seconds"] > 0
