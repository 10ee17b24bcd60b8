"""The benchmark of training against transformers' trainer, in a tiny geometry: what it compares and prints."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

TINY = ["--geometry", "tiny", "--device", "cpu", "--records", "12", "--repeats", "1", "--warmup", "0"]


@pytest.fixture
def bench(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import training

    return training


def test_every_saving_is_switched_off_once(bench, capsys):
    bench.main(TINY)
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
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


def test_the_loop_against_a_bare_one(bench, capsys):
    bench.main([*TINY, "--loop"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["case"] == "overhead"
    assert row["step_seconds"] > 0
