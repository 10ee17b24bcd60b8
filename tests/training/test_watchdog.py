from __future__ import annotations

import json

import pytest

from skipvision_train.training.watchdog import EXIT_STATUS, RankState, Watchdog, behind, diagnosis


def state(rank, marks, phase="forward", step=3, records=(), since=100.0):
    return RankState(rank, "host", 50 + rank, marks, phase, step, records, since)


def test_the_one_that_has_begun_least_is_behind():
    assert behind({0: state(0, 9), 1: state(1, 8), 2: state(2, 9)}) == [1]
    assert behind({0: state(0, 9), 1: state(1, 9)}) == []


def test_every_process_is_told_even_an_unknown_one():
    lines = diagnosis({0: state(0, 9), 2: state(2, 7, "data", records=("4 of a",), since=40.0)}, 3, 130.0)
    assert lines == [
        "rank 0 (host, process 50): forward of step 3 for 30 s",
        "rank 2 (host, process 52): data of step 3 for 90 s, records 4 of a",
        "rank 1: nothing is known",
        "stuck: rank 2; the others wait for it",
    ]


@pytest.fixture
def dogs(tmp_path):
    clock, ended = [1000.0], []

    def make(rank):
        return Watchdog(tmp_path, rank, 2, 60.0, lambda: ("9 of b",), ended.append, lambda: clock[0])

    return clock, ended, make(0), make(1)


def test_a_process_without_progress_tells_what_all_do_and_ends(dogs, tmp_path, capfd):
    clock, ended, first, second = dogs
    for dog in (first, second):
        dog.begin("other", 1)
    second.begin("data", 2)
    first.begin("data", 2)
    first.begin("backward", 2, ("1 of a",))
    clock[0] += 59
    second.look()
    first.look()
    assert not ended
    clock[0] += 2
    first.look()
    assert ended == [EXIT_STATUS]
    said = capfd.readouterr().err
    assert "rank 0 made no progress for 60 s" in said
    assert "backward of step 2 for 61 s, records 1 of a" in said
    assert "data of step 2 for 61 s, records 9 of b" in said
    assert "stuck: rank 1; the others wait for it" in said
    stacks = (tmp_path / "ranks" / "rank-0.stacks.txt").read_text()
    assert "test_a_process_without_progress" in stacks
    assert json.loads((tmp_path / "ranks" / "rank-1.json").read_text())["phase"] == "data"


def test_progress_starts_the_time_anew(dogs):
    clock, ended, first, _ = dogs
    for _ in range(3):
        first.begin("forward", 1)
        clock[0] += 50
        first.look()
    assert not ended


def test_entering_starts_the_time_anew(dogs):
    """What took long before training began is not held against it."""
    clock, ended, _, _ = dogs
    first = dogs[2]
    first.begin("other", 1)
    clock[0] += 100
    first.stuck_after = 0.0  # no thread of its own
    with first:
        first.stuck_after = 60.0
        first.look()
    assert not ended


def test_a_file_of_another_process_that_is_half_written_is_left_out(dogs, tmp_path, capfd):
    clock, ended, first, second = dogs
    second.look()
    (tmp_path / "ranks" / "rank-1.json").write_text('{"rank": 1, "ho')
    first.begin("forward", 1)
    clock[0] += 61
    first.look()
    assert ended == [EXIT_STATUS]
    assert "rank 1: nothing is known" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_does_not_hide_what_hangs(dogs, tmp_path, capfd):
    clock, ended, first, _ = dogs
    first.begin("forward", 1)
    first.look()
    first.begin("backward", 2)
    clock[0] += 61
    (tmp_path / "ranks" / "rank-0.tmp").mkdir()  # where the next state would be written first
    (tmp_path / "ranks" / "rank-0.stacks.txt").mkdir()
    first.look()
    assert ended == [EXIT_STATUS]
    said = capfd.readouterr().err
    assert "backward of step 2 for 61 s" in said  # what it does now, not what it could last write
    assert "the stacks cannot be written" in said


def test_the_thread_ends_with_the_context(tmp_path):
    dog = Watchdog(tmp_path, 0, 1, 1e6)
    with dog:
        thread = dog._thread
        assert thread is not None
        assert thread.is_alive()
    assert not thread.is_alive()
    with Watchdog(tmp_path, 0, 1, 0) as nothing:
        assert nothing is None
