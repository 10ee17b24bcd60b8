"""The diffs of ``docs/extending.md`` apply together to a copy of the package, and their tests pass there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, blocks

DIFFS = sorted((ROOT / "docs" / "extending").glob("*.diff"))
COPIED = ("skipvision_train", "conf", "data_recipes")


def run(folder: Path, *words: str) -> str:
    """Run a command in the copy, which is imported instead of the installed package."""
    environment = dict(
        os.environ, PYTHONPATH=str(folder), GIT_CEILING_DIRECTORIES=str(folder.parent), OMP_NUM_THREADS="1"
    )
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def added_tests(diff: Path) -> list[str]:
    return [line.removeprefix("+++ b/") for line in diff.read_text().splitlines() if line.startswith("+++ b/tests/")]


def test_there_is_one_of_each():
    assert [diff.stem for diff in DIFFS] == ["connector", "format", "method", "metric"]
    assert all(len(added_tests(diff)) == 1 for diff in DIFFS)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_small_and_shown(diff):
    lines = diff.read_text().splitlines()
    changed = [line for line in lines if line[:1] in ("+", "-") and not line.startswith(("+++ ", "--- "))]
    assert 0 < len(changed) < 60
    shown = [block.text for block in blocks("docs/extending.md") if block.language == "diff"]
    assert diff.read_text() in shown


def test_they_apply_and_their_tests_pass(tmp_path):
    folder = tmp_path / "copy"
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        run(folder, "git", "apply", str(diff))
    tests = [test for diff in DIFFS for test in added_tests(diff)]
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={folder}")
    said = run(folder, sys.executable, "-m", "pytest", *options, *tests)
    assert " passed" in said
    assert "failed" not in said
    words = ("flops", "geometry=llava_1_5_7b", "plan=deep_ffn_skip", "plan.layer=16", "format=json")
    assert '"deep_ffn_skip"' in run(folder, sys.executable, "-m", "skipvision_train", *words)
