"""A folder of results: never those of another configuration by accident, never half of them, all of one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from skipvision_train.commands import analyze, bench, calibrate, evaluate
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.folders import HARMLESS, ResultsFolder, differences, filled, flatten, require_whole

MADE = ("table.json", "curve.png", "bank/*.json")


@dataclass
class Part:
    method: str = "own"
    layers: list[int] | None = None


@dataclass
class Config:
    checkpoint: str = "a"
    output: str = "out"
    overwrite: bool = False
    batch_size: int = 16
    limit: int | None = None
    plan: Part = field(default_factory=Part)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(cfg: Config, **files: str) -> None:
    """One run: ``table_json="..."`` writes ``table.json``, ``bank__a_json`` writes ``bank/a.json``."""
    with ResultsFolder.open("measure", cfg, MADE).writing() as folder:
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def content() -> dict[str, str]:
    found = {str(path.relative_to("out")): path.read_text() for path in Path("out").rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if name != "measure.run.json"}


def test_another_configuration_is_refused_and_the_former_results_stay():
    write(Config(limit=3), table_json="old", bank__a_json="old")
    before = content()
    with pytest.raises(ConfigError) as refused:
        write(Config(limit=5, plan=Part("vskip", [1])), table_json="new")
    assert str(refused.value) == (
        "output: out holds results of another configuration: limit (3 before, 5 now), plan.layers (None before, [1] "
        "now), plan.method (own before, vskip now); name another output=..., or replace them with overwrite=true"
    )
    assert content() == before == {"table.json": "old", "bank/a.json": "old"}


def test_overwriting_leaves_nothing_of_the_former_run_and_nothing_of_others():
    write(Config(limit=3), table_json="old", curve_png="old", bank__a_json="old", bank__b_json="old")
    Path("out/mine.json").write_text("mine")
    Path("out/bench.run.json").write_text("{}")
    write(Config(limit=5, overwrite=True), table_json="new")
    assert content() == {"table.json": "new", "mine.json": "mine", "bench.run.json": "{}"}
    assert not Path("out/bank").exists()
    write(Config(limit=5), table_json="newer", bank__c_json="newer")  # now this is the configuration
    assert content().items() >= {"table.json": "newer", "bank/c.json": "newer"}.items()


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"output": "./out/"}, {"overwrite": True}, {}])
def test_the_same_configuration_writes_again(change):
    write(Config(), table_json="old", curve_png="old")
    write(Config(**change), table_json="new")
    assert content() == {"table.json": "new"}


def test_a_run_that_fails_before_its_end_changes_nothing():
    write(Config(limit=3), table_json="old")

    def fail() -> None:
        with ResultsFolder.open("measure", Config(limit=4, overwrite=True), MADE).writing() as new:
            (new / "table.json").write_text("new")
            raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        fail()
    assert content() == {"table.json": "old"}
    require_whole("out", "measure")
    write(Config(limit=3), table_json="again")


@pytest.mark.parametrize("moment", range(6))
def test_a_killed_run_is_recognised_and_never_mixed_with_the_former_one(moment):
    """The process dies at one of its changes to the folder: the record, two files go, two come, the record."""
    write(Config(limit=3), table_json="old", curve_png="old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(moment)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    there = {path.name: path.read_text() for path in map(Path, ("out/table.json", "out/curve.png")) if path.exists()}
    assert len(set(there.values())) < 2
    if moment == 0:
        assert there == {"table.json": "old", "curve.png": "old"}
        require_whole("out", "measure")
        write(Config(limit=3), table_json="again")
    else:
        with pytest.raises(DataError, match=r"^out: skipvision measure was stopped while it wrote these results"):
            require_whole("out", "measure")
        write(Config(limit=4), table_json="again")
    assert content() == {"table.json": "again"}
    require_whole("out", "measure")


KILLED = textwrap.dedent(
    f"""
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from test_results_folder import MADE, Config
    from skipvision_train import folders

    left = int(sys.argv[1])

    def counted(change):
        def run(self, *given):
            global left
            if not left:
                os._exit(9)
            left -= 1
            return change(self, *given)
        return run

    with folders.ResultsFolder.open("measure", Config(limit=4, overwrite=True), MADE).writing() as new:
        for name in ("table.json", "curve.png"):
            (new / name).write_text("late")
        Path.unlink, Path.replace = counted(Path.unlink), counted(Path.replace)
    """
)


def test_results_without_a_record_are_not_replaced_by_accident():
    Path("out").mkdir()
    Path("out/curve.png").write_text("old")
    with pytest.raises(ConfigError, match=r"^output: out holds curve\.png, and no measure\.run\.json says"):
        write(Config(), table_json="new")
    require_whole("out", "measure")
    assert content() == {"curve.png": "old"}
    write(Config(overwrite=True), table_json="new")
    assert content() == {"table.json": "new"}


def test_nothing_is_made_before_there_is_something_to_write():
    folder = ResultsFolder.open("measure", Config(output="out/a/b"), MADE)
    assert not Path("out").exists()
    with folder.writing() as new:
        (new / "table.json").write_text("new")
    assert Path("out/a/b/table.json").read_text() == "new"


def test_files_that_are_no_results_do_not_matter():
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    write(Config(), table_json="new")
    assert content() == {"notes.txt": "mine", "table.json": "new"}


@pytest.mark.parametrize("text", ["[]", '{"configuration": 1, "finished": true}', '{"configuration": {}}', "{"])
def test_a_broken_record_is_named(text):
    write(Config(), table_json="old")
    Path("out/measure.run.json").write_text(text)
    with pytest.raises(DataError, match=r"^out/measure\.run\.json: not "):
        write(Config(), table_json="new")
    write(Config(overwrite=True), table_json="new")
    assert content() == {"table.json": "new"}


def test_what_cannot_be_a_folder_is_refused_before_anything_is_measured(monkeypatch):
    Path("out").write_text("mine")
    with pytest.raises(ConfigError, match=r"^output: out is a file; name a folder"):
        ResultsFolder.open("measure", Config(), MADE)
    Path("out").chmod(0o755)
    with pytest.raises(ConfigError, match=r"^output: out/a/b cannot be written: .*/out is no folder that takes"):
        ResultsFolder.open("measure", Config(output="out/a/b"), MADE)
    Path("out").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"^output: out cannot be written: .* is no folder that takes"):
        ResultsFolder.open("measure", Config(), MADE)


def test_a_folder_that_fills_the_disk_keeps_the_former_results():
    write(Config(), table_json="old")
    with (
        pytest.raises(ConfigError, match=r"^output: out cannot be written: No space left on device"),
        ResultsFolder.open("measure", Config(), MADE).writing(),
    ):
        raise OSError(28, "No space left on device")
    assert content() == {"table.json": "old"}


def test_a_field_that_is_younger_than_the_record_did_what_its_default_does():
    write(Config(limit=3), table_json="old")
    record = json.loads(Path("out/measure.run.json").read_text())
    del record["configuration"]["plan"], record["configuration"]["checkpoint"]
    Path("out/measure.run.json").write_text(json.dumps(record))
    write(Config(limit=3), table_json="new")
    Path("out/measure.run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"configuration: checkpoint \(a before, b now\);"):
        write(Config("b", limit=3), table_json="newer")
    assert content() == {"table.json": "new"}


def test_a_record_of_a_part_is_not_filled_with_its_absence():
    assert filled({"geometry.layers": 3}, {"geometry": None, "seed": 0}) == {"geometry.layers": 3, "seed": 0}


def test_differences_are_few_and_short():
    before, now = flatten({"a": {"b": 1, "c": {}}, "x": "y" * 90}), flatten({"a": {"b": 2, "c": {}}, "x": "z"})
    assert differences(before, now, ()) == f"a.b (1 before, 2 now), x ({'y' * 57}... before, z now)"
    many = {f"k{i}": 1 for i in range(6)}
    assert differences(many, {}, ("k5",)).endswith("k3 (1 before, None now) and 1 more")


def test_only_what_does_not_change_results_is_harmless():
    fields = {name for command in (analyze, bench, calibrate, evaluate) for name in command.Config.__annotations__}
    assert fields >= set(HARMLESS)
