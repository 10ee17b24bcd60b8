"""The evidence script: seeds joined by hand, and the whole road on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipvision_train.evaluation.bench_results import BenchResult, Cost, Difference, Row
from skipvision_train.evaluation.metrics import accuracy
from skipvision_train.evaluation.timing import PlanTimes, Spread
from skipvision_train.plans import dense, vskip

QUESTIONS = (("1", "a"), ("2", "a"), ("3", "b"), ("4", "b"))


@pytest.fixture
def evidence(pytestconfig, monkeypatch):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import evidence

    return evidence


def made(name, scores, flops, kv, first, setting="s"):
    tasks = {task: accuracy(int(sum(scores[k : k + 2])), 2) for task, k in (("a", 0), ("b", 2))}
    mean = replace(tasks["a"], value=sum(scores) / 4)
    spread = Spread(first, first, first)
    plan = (vskip([0]) if "vskip" in name else dense()).bind(2)
    cost = Cost(flops, flops, kv, {}, 1.0, 1.0)
    times = PlanTimes(spread, spread, spread, kv)
    return Row(name, setting, plan, mean, tasks, Difference(0, 0, 0), 0.0, cost, times, tuple(map(float, scores)))


def bench(*rows):
    return BenchResult({}, {}, QUESTIONS, rows)


def test_seeds_are_joined(evidence):
    models = [
        bench(made("dense", [1, 1, 1, 0], 10.0, 8.0, 2.0), made("vskip at 0.9", [1, 0, 1, 0], 9.0, 8.0, 1.0, "x")),
        bench(made("dense", [1, 1, 0, 0], 10.0, 8.0, 2.0), made("vskip at 0.9", [1, 1, 1, 0], 7.0, 8.0, 3.0, "y")),
    ]
    trained = [bench(made("own", [0, 0, 1, 0], 5.0, 2.0, 9.0)) for _ in range(2)]
    found = {line.name: line for line in evidence.join(models, trained, [0.9, 0.5])}
    assert list(found) == ["dense", evidence.TRAINED, "V-Skip"]
    skipped = found["V-Skip"]
    assert skipped.share == pytest.approx(0.8)
    assert skipped.mean == pytest.approx((0.5 + 0.75) / 2)
    assert skipped.deviation == pytest.approx(0.25 / 2**0.5)
    # Task a: mean of (0 and 0, -1 and 0) is -1/4; task b: (0 and 1, 0 and 0) is 1/4.
    assert skipped.difference.value == pytest.approx(0)
    assert (skipped.tasks["a"].value, skipped.tasks["a"].total) == (0.75, 4)
    assert skipped.first_token == pytest.approx((0.5 + 1.5) / 2)
    assert skipped.settings == ["x", "y"]
    own = found[evidence.TRAINED]
    assert (own.share, own.kv, own.first_token) == (0.5, 0.25, None)  # timed in another run than the dense model
    text = evidence.table(list(found.values()))
    assert "| V-Skip | 90 % | 80.0 % | 62.5 ± 17.7 | +0.0 (" in text
    assert "| V-Skip | 90 % | x / y |" in text


def test_other_questions_are_not_joined(evidence):
    models = [bench(made("dense", [1, 1, 1, 0], 1.0, 1.0, 1.0)) for _ in range(2)]
    models[1] = replace(models[1], questions=(("9", "a"), *QUESTIONS[1:]))
    with pytest.raises(AssertionError):
        evidence.join(models, [], [])


def test_the_gpu_run_names_its_own_folders(evidence, tmp_path):
    args = evidence.arguments(["--gpu", "--output", str(tmp_path)])
    assert (args.data, args.models) == (tmp_path / "data", tmp_path / "models")
    with pytest.raises(SystemExit):
        evidence.arguments([])


def test_training_can_be_a_command_of_its_own(evidence, tmp_path, monkeypatch):
    """On a machine that is lent for minutes; what it trains is found again by the same command without the option."""
    steps = []
    monkeypatch.setattr(evidence, "train_large", lambda args: steps.append("train"))
    monkeypatch.setattr(evidence, "measure", lambda args, kind, seed: steps.append((kind, seed)))
    words = ["evidence.py", "--gpu", "--seeds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--only-train"])
    evidence.main()
    assert steps == ["train"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(evidence, "join", None)
    with pytest.raises(TypeError):
        evidence.main()
    assert steps == ["train", "train", ("dense", 0), ("trained", 0)]
