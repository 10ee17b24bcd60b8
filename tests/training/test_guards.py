from __future__ import annotations

import json
import math
import socket
import statistics
from pathlib import Path

import pytest
import torch
from launched import two_processes

from skipvision_train.errors import ConfigError, TrainingError
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.guards import BatchLoss, LossSpikes, NonfiniteGuard, explained_memory, poison
from skipvision_train.training.ranks import check_started_alike, differences
from skipvision_train.training.run import run_stage
from tests.support.faulty_stage import FAULTY_STEP, Poison


def lines_of(cfg):
    return read_metrics(Path(cfg.trainer.output_dir) / "metrics.jsonl")


def check_left_out(cfg, plain_rates, rank):
    rows = lines_of(cfg)
    assert [row["loss"] is None for row in rows] == [False, False, True, False]
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False]
    assert [row["guards/nonfinite_steps"] for row in rows] == [0, 0, 1, 1]
    assert [row["lr/llm"] for row in rows] == pytest.approx(plain_rates)
    (event,) = map(json.loads, (Path(cfg.trainer.output_dir) / "nonfinite.jsonl").read_text().splitlines())
    assert event["step"] == FAULTY_STEP + 1
    assert {batch["rank"] for batch in event["batches"] if batch["loss"] is None} == {rank}
    assert all(sample.endswith(" of tiny") for batch in event["batches"] for sample in batch["samples"])
    assert sum(len(batch["samples"]) for batch in event["batches"]) == cfg.trainer.global_batch


RATES = [0.0, 5e-3, 0.75 * 5e-3, 0.25 * 5e-3]


def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(make_cfg):
    cfg, fault = make_cfg("trainer.save_every=0", "trainer.per_device_batch=1"), Poison(True)
    run_stage(cfg, (fault,))
    assert fault.seen == {"weights": True, "moments": True}
    check_left_out(cfg, RATES, rank=0)


def test_the_budget_stops_the_run_with_the_records(make_cfg):
    cfg = make_cfg("trainer.save_every=0", "trainer.guards.nonfinite_budget=0")
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite .* \d+ of tiny.*nonfinite_budget is 0"):
        run_stage(cfg, (Poison(True),))


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_all_ranks_leave_out_the_step_of_one(make_cfg, tmp_path, engine):
    zero = {
        "plain": (),
        "zero2": ("deepspeed.stage=2",),
        "zero3": ("deepspeed.stage=3", "deepspeed.persistence_threshold=0"),
    }
    cfg = make_cfg("trainer.save_every=0", "trainer.per_device_batch=1", *zero[engine])
    done = two_processes("faulty_stage.py", cfg, "poison", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {"weights": True, "moments": True}
    check_left_out(cfg, RATES, rank=1)


@pytest.mark.distributed
def test_ranks_with_different_configurations_are_told_apart_before_training(make_cfg, tmp_path):
    done = two_processes("faulty_stage.py", make_cfg(), "configuration", tmp_path)
    assert done.returncode != 0
    expected = "error: rank 0 and rank 1 were started with different stage.weight_decay 0.0 and 0.125"
    assert done.stderr.count(expected) == 2  # both ranks say it, none waits
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_stuck_rank_is_named(make_cfg, tmp_path):
    done = two_processes(
        "faulty_stage.py", make_cfg("trainer.guards.stuck_after=20", "trainer.save_every=0"), "hang", tmp_path
    )
    assert done.returncode != 0
    assert f"forward of step {FAULTY_STEP + 1}" in done.stderr or f"other of step {FAULTY_STEP + 1}" in done.stderr
    assert "stuck: rank 1; the others wait for it" in done.stderr
    stacks = [file.read_text() for file in (tmp_path / "run" / "ranks").glob("*.stacks.txt")]
    assert any("faulty_stage.py" in text and "on_step_begin" in text for text in stacks)


def test_a_taken_port_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match=f"MASTER_PORT {port}: another program uses the port"):
            check_started_alike({}, 1.0)


def test_a_rank_that_does_not_show_up_is_an_error(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"not all processes came there: .*1/2"):
        check_started_alike({}, 0.2)


def test_differences_name_fields_that_only_one_has():
    assert differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a 1 and None", "b 2 and 3", "c None and 4"]


@pytest.mark.parametrize("value", [1.5, torch.inf, torch.nan])
def test_poison_leaves_finite_losses_and_spoils_all_gradients_of_others(value):
    weight = torch.tensor([2.0, 0.0], requires_grad=True)
    loss = poison((weight * 3).sum() + value)
    loss.backward()
    if value == 1.5:
        assert loss.item() == 7.5
        assert weight.grad.tolist() == [3.0, 3.0]
    else:
        assert weight.grad.isnan().all()


def test_the_budget_counts_on_behind_a_resume(tmp_path):
    batch = BatchLoss(0, None, ("7 of a",))
    guard = NonfiniteGuard(2, tmp_path / "n.jsonl", writes=True)
    guard.begin(0)
    guard.skipped(3, [batch])
    guard.skipped(8, [batch])
    again = NonfiniteGuard(2, tmp_path / "n.jsonl", writes=True)
    again.begin(5)  # step 8 was not kept
    assert again.count == 1
    again.skipped(8, [batch])
    with pytest.raises(TrainingError, match="7 of a"):
        again.skipped(9, [batch])


def test_a_run_continues_with_the_count_of_its_checkpoint(tmp_path):
    first = NonfiniteGuard(9, tmp_path / "n.jsonl", writes=True)
    for step in (3, 8):
        first.skipped(step, [BatchLoss(0, None, ("7 of a",))])
    for step, count in ((2, 0), (3, 1), (7, 1), (8, 2)):
        again = NonfiniteGuard(9, tmp_path / "n.jsonl", writes=True)
        again.begin(step)
        assert again.count == count


@pytest.mark.parametrize(("lost", "kept"), [(1, [3, 5]), (40, [3]), (100, [])])
def test_a_cut_last_line_is_forgiven_and_the_next_one_stands_alone(tmp_path, lost, kept):
    """As SIGKILL or a full disk leaves it; without its last character, the line's end, the line is whole."""
    path, batch = tmp_path / "n.jsonl", BatchLoss(0, None, ("7 of a",))
    first = NonfiniteGuard(9, path, writes=True)
    for step in (3, 5):
        first.skipped(step, [batch])
    whole = path.read_text()
    path.write_text(whole[:-lost])
    other = NonfiniteGuard(9, path, writes=False)
    other.begin(6)
    assert path.read_text() == whole[:-lost]
    guard = NonfiniteGuard(9, path, writes=True)
    guard.begin(6)
    assert guard.count == other.count == len(kept)
    guard.skipped(8, [batch])
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [*kept, 8]


def test_only_the_writing_process_writes(tmp_path):
    guard = NonfiniteGuard(1, tmp_path / "n.jsonl", writes=False)
    guard.begin(0)
    guard.skipped(1, [BatchLoss(0, None, ("1 of a",))])
    assert guard.count == 1
    assert list(tmp_path.iterdir()) == []


def test_records_of_the_guilty_batches_alone_are_named(tmp_path):
    guard = NonfiniteGuard(0, tmp_path / "n.jsonl", writes=False)
    batches = [BatchLoss(0, 1.0, ("1 of a",)), BatchLoss(1, None, ("2 of a",)), BatchLoss(3, None, ("3 of a",))]
    with pytest.raises(TrainingError, match=r"the loss is not finite \(rank 1, 3\); records: 2 of a, 3 of a;"):
        guard.skipped(1, batches)


@pytest.mark.parametrize(("number", "end"), [(16, "15 of a;"), (17, "15 of a and 1 more;")])
def test_a_message_names_sixteen_records(tmp_path, number, end):
    guard = NonfiniteGuard(0, tmp_path / "n.jsonl", writes=False)
    with pytest.raises(TrainingError, match=f"records: 0 of a, .*{end}"):
        guard.skipped(1, [BatchLoss(0, None, tuple(f"{i} of a" for i in range(number)))])


def test_finite_losses_with_a_nonfinite_gradient_name_every_record(tmp_path):
    guard = NonfiniteGuard(0, tmp_path / "n.jsonl", writes=False)
    with pytest.raises(TrainingError, match=r"gradient is not finite though the loss is.*1 of a, 2 of a"):
        guard.skipped(1, [BatchLoss(0, 1.0, ("1 of a",)), BatchLoss(1, 1.0, ("2 of a",))])


def test_a_spike_is_measured_against_the_median(tmp_path):
    spikes, losses = LossSpikes(window=100, least=5), [1.0, 1.1, 0.9, 1.2, 0.8, 50.0]
    scores = [spikes.score(loss) for loss in losses]
    assert scores[:5] == [None] * 5
    before = losses[:5]
    deviation = statistics.median(abs(x - statistics.median(before)) for x in before)
    assert scores[5] == pytest.approx(49.0 / (1.4826 * deviation))
    assert spikes.score(1.0) == pytest.approx(-0.05 / (1.4826 * 0.15), abs=1e-6)  # one outlier hardly moves either


def test_a_loss_that_hardly_moves_is_measured_in_hundredths():
    spikes = LossSpikes(window=100, least=3)
    assert [spikes.score(2.0) for _ in range(4)] == [None, None, None, 0.0]
    assert spikes.score(2.1) == pytest.approx(5)  # 0.1 over a hundredth of 2
    nothing = LossSpikes(window=100, least=1)
    nothing.score(0.0)
    assert math.isfinite(nothing.score(1e-9))


def test_losses_that_are_not_finite_are_not_remembered():
    spikes = LossSpikes(window=100, least=2)
    for loss in (1.0, math.nan, math.inf):
        assert spikes.score(loss) is None
    spikes.score(1.2)
    assert spikes.score(1.1) == pytest.approx(0)


def test_only_the_last_losses_count():
    spikes = LossSpikes(window=3, least=3)
    for loss in (9.0, 9.0, 9.0, 1.0, 1.2, 0.8):
        spikes.score(loss)
    assert spikes.score(1.2) == pytest.approx(0.2 / (1.4826 * 0.2))


def test_out_of_memory_says_what_to_change():
    with (
        pytest.raises(TrainingError, match=r"too small: CUDA out of memory. Tried to allocate 2.00 GiB; try X"),
        explained_memory("try X"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Of the allocated memory 1")


@pytest.mark.parametrize("change", ["guards.nonfinite_budget=-1", "guards.memory=maybe", "peak_tflops=0"])
def test_settings_out_of_range_are_refused(make_cfg, change):
    with pytest.raises(ConfigError, match=rf"^trainer\.{change.partition('=')[0]}: "):
        run_stage(make_cfg(f"trainer.{change}"))
