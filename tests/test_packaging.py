"""The wheel: configuration and recipes travel inside, and commands work far away from the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as pip would lay it out, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def skipvision(installed, cwd, *arguments):
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from skipvision_train.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_configuration_and_recipes_travel_inside(installed):
    for folder in ("conf", "data_recipes"):
        expected = {p.relative_to(REPOSITORY / folder) for p in (REPOSITORY / folder).rglob("*.yaml")}
        found = {p.relative_to(installed / "skipvision_train" / folder) for p in installed.rglob(f"{folder}/**/*.yaml")}
        assert expected, folder
        assert found == expected


def test_commands_work_from_the_wheel_with_a_users_own_configuration(installed, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "my_run.yaml").write_text("# @package _global_\ntrainer:\n  seed: 4321\n")
    result = skipvision(installed, tmp_path, "train", "--config-dir", "mine", "experiment=my_run", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "seed: 4321" in result.stdout
    assert str(REPOSITORY) not in result.stdout + result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
