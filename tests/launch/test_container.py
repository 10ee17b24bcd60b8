"""The Dockerfile as text: there is no Docker where tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Pairs of instruction and arguments, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def test_the_base_is_pinned_to_a_patch_release():
    assert [re.fullmatch(r"nvidia/cuda:12\.\d+\.\d+-devel-ubuntu\d\d\.04", base) is not None
            for base in arguments("FROM")] == [True]  # fmt: skip


def test_everything_behind_the_system_packages_runs_without_root():
    (user,) = arguments("USER")
    assert int(user) > 1000
    words = [word for word, _ in instructions()]
    root = [rest for word, rest in instructions()[: words.index("USER")] if word == "RUN"]
    assert [("apt-get" in text or "useradd" in text) for text in root] == [True] * len(root)
    assert "sudo" not in (ROOT / "Dockerfile").read_text()
    assert f"--uid {user}" in next(text for text in root if "useradd" in text)


def test_what_is_copied_exists_and_belongs_to_the_user():
    copied = [text.split() for text in arguments("COPY")]
    assert copied
    for owner, *sources, _ in copied:
        assert owner == f"--chown={arguments('USER')[0]}"
        for source in sources:
            assert (ROOT / source).exists(), source
            assert "*" not in source
            assert source != "."


def test_dependencies_are_installed_before_the_sources_are_copied():
    text = [f"{word} {rest}" for word, rest in instructions()]
    installed = next(place for place, line in enumerate(text) if "pip install -e" in line)
    sources = next(place for place, line in enumerate(text) if re.match(r"COPY \S+ skipvision_train ", line))
    assert installed < sources


def test_the_build_runs_the_entry_point():
    assert "skipvision --version" in arguments("RUN")[-1]
    assert arguments("ENTRYPOINT") == ['["skipvision"]']


@pytest.mark.parametrize("word", ["TOKEN", "KEY", "PASSWORD", "SECRET"])
def test_no_secret_is_set(word):
    assert not any(word in rest.upper() for rest in (*arguments("ENV"), *arguments("ARG")))


@pytest.mark.parametrize("name", [".git", ".venv", "outputs", "wandb", ".env", "**/.netrc"])
def test_left_out_of_the_build(name):
    assert name in (ROOT / ".dockerignore").read_text().splitlines()
