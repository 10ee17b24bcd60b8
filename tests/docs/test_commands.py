"""Every command of the documentation: composed, and run on tiny inputs or under a line that says what it needs.

A block is marked by a line before it: ``<!-- needs: gpu, weights (LLaMA-3-8B) -->``. Marked or not, the overrides of
every ``skipvision`` command have to compose, training configurations to validate, and options of benchmarks to parse.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from documents import DOCUMENTS, NEEDS, ROOT, Block, Command, blocks, console_commands, inline_commands, shell_commands

from skipvision_train import cli
from skipvision_train.config.validate import validate

PASSIVE = {".", "cd", "cp", "for", "done", "mkdir", "ls", "cat", "head", "export", "source", "echo"}
"""Change nothing that is ours, or belong to the shell."""

EXTERNAL = {
    "git",
    "pre-commit",
    "pip",
    "python3",
    "lmms-eval",
    "accelerate",
    "docker",
    "sbatch",
    "srun",
    "deepspeed",
    "torchrun",
    "ssh",
}
"""Are not run here: their block says why."""

COMPOSED = {
    "train": "tests/training/test_run.py",
    "export": "tests/training/test_export.py",
    "serve": "tests/serve/test_app.py",
    "demo": "tests/commands/test_demo.py",
}
"""Commands that take long, never end, or need a run's checkpoint: composed here, run by the tests in these files."""

SMALLER: dict[str, tuple[str, ...]] = {
    "analyze": ("samples=2", "generated=2", "power_iterations=20"),
    "bench": ("limit=1", "max_new_tokens=3", "timing_samples=1", "repeats=1", "decode_tokens=2"),
    "calibrate": ("samples=2",),
    "data check": ("workers=1",),
    "data preview": ("samples=2",),
    "evaluate": ("limit=2", "max_new_tokens=3", "timing_samples=1"),
    "generate": ("max_new_tokens=3",),
    "sketches": ("data.pretrain=14", "data.sft=14", "data.heldout=14", "processes=1"),
}
"""Overrides that make the run of a command short; they change nothing that its own overrides say, but how much."""


class Parsed(Exception):  # noqa: N818
    """The options of a script were taken."""


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[Any, str]]:
    """The command line in this process: the status, and what it wrote to stderr."""

    def run(arguments: Sequence[str]) -> tuple[Any, str]:
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["skipvision"])
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def composed(call, monkeypatch) -> Callable[[Sequence[str]], list[Any]]:
    """The configurations that a command would run with; several with ``--multirun``."""

    def compose(arguments: Sequence[str]) -> list[Any]:
        name, _ = cli.command_name(list(arguments))
        configs: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.import_module(f"skipvision_train.commands.{cli.module_name(name)}"), "run", configs.append
            )
            status, err = call(arguments)
        assert status == 0, err
        assert configs
        return configs

    return compose


def own_arguments(command: Command) -> tuple[list[str], int] | None:
    """Arguments of ``skipvision`` in a command, also behind a launcher, and the number of processes; else None."""
    words = list(command.words)
    if Path(words[0]).name == "skipvision":
        return words[1:], 1
    for start in (["-m", "skipvision_train"], ["--module", "skipvision_train"]):
        for at in range(len(words) - 1):
            if words[at : at + 2] == start:
                count = re.search(r"--(?:nproc_per_node|num_gpus|num_accelerators)[= ](\d+)", " ".join(words[:at]))
                return words[at + 2 :], int(count[1]) if count else 8
    if words[:2] == ["docker", "run"] and "skipvision" in words:  # the image, whose entry point is the command
        return words[words.index("skipvision") + 1 :], 1
    if words[0] in ("launch/torchrun.sh", "launch/deepspeed.sh"):
        return ["train", *words[1:]], int(command.environment.get("PROCESSES", "8")) * nodes_of(command.environment)
    if words[0] == "sbatch":
        script = next(at for at, word in enumerate(words) if word.endswith(".sbatch"))
        count = re.search(r"--nodes=(\d+)", " ".join(words[:script]))
        return ["train", *words[script + 1 :]], 8 * int(count[1] if count else 1)
    return None


def nodes_of(environment: dict[str, str]) -> int:
    return int(environment.get("NODES", "1"))


def filled(arguments: Sequence[str]) -> list[str]:
    """Without what a marked block leaves to the reader: ``...`` and ``key=...``."""
    return [word for word in arguments if word != "..." and not word.endswith("=...")]


def is_help(arguments: Sequence[str]) -> bool:
    return not arguments or arguments[0].startswith("-") or "--help" in arguments


def checked(command: Command, composed: Callable[[Sequence[str]], list[Any]]) -> None:
    """Compose ``skipvision`` commands, validate training, parse the options of benchmarks, look up make's targets."""
    words = command.words
    if (found := own_arguments(command)) is not None:
        arguments, processes = filled(found[0]), found[1]
        if not is_help(arguments):
            for config in composed(arguments):
                if arguments[0] == "train":
                    validate(config, processes)
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif (script := benchmark(words)) is not None:
        parse_options(script, words[2:])
    elif words[0] in ("bash", "sh") or words[0].startswith("launch/"):
        assert (ROOT / words[words[0] in ("bash", "sh")]).is_file(), f"{command}: no such script"
    else:
        name = words[0].rpartition("/")[2]
        assert name in PASSIVE | EXTERNAL | {"python"}, f"{command}: unknown; add it to this test"


def benchmark(words: Sequence[str]) -> Path | None:
    """The script of ``python benchmarks/prefill.py``, also from inside of the folder."""
    if Path(words[0]).name != "python" or len(words) < 2 or not words[1].endswith(".py"):
        return None
    return next((path for path in (ROOT / words[1], ROOT / "benchmarks" / words[1]) if path.is_file()), ROOT / words[1])


def parse_options(script: Path, options: Sequence[str]) -> None:
    """Start a script up to where it has read its options.

    Raises:
        SystemExit: it does not take them.
    """
    assert script.is_file(), f"{script} does not exist"
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        parse(self, list(options))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module = importlib.import_module(script.stem)
        with pytest.raises(Parsed):
            module.main()


def forget_former(arguments: Sequence[str], folder: Path, written: set[str]) -> None:
    """What a document writes itself it does not find: a furnished folder goes when it is written to first."""
    for word in arguments:
        output = word.removeprefix("output=")
        if output != word and output not in written and (folder / output).is_dir():
            shutil.rmtree(folder / output)
        written.add(output)


def in_folder(words: Sequence[str], folder: Path) -> list[str]:
    """The words with /data and /models below a folder."""
    return [re.sub(r"(?<![\w./])/(data|models)(?=/|$|\])", rf"{folder}/\1", word) for word in words]


# --- what is in the documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_marked_as_what_they_are(document):
    for block in blocks(document):
        assert set(block.needs) <= set(NEEDS), f"{block}: needs one of {', '.join(NEEDS)}"
        assert not block.needs or block.reason, f"{block}: the marker gives no reason: <!-- needs: gpu (why) -->"
        if block.language not in ("bash", "diff"):
            for line in block.text.splitlines():
                start = re.match(r"(skipvision|make|python|torchrun|deepspeed|sbatch|docker|lmms-eval) ", line)
                assert start is None, f"{block}: a command in a block that is not marked as bash: {line}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_compose(document, composed):
    shown = [command for block in blocks(document) if not block.language for command in console_commands(block)]
    for command in [*shell_commands(document), *shown]:
        try:
            checked(command, composed)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}\n{error}") from error
    for place, text in inline_commands(document):
        try:
            composed(shlex.split(text)[1:])
        except (Exception, SystemExit) as error:
            if "needs a value" not in str(error):  # running text names what it is about alone
                raise AssertionError(f"{place}: {text}\n{error}") from error


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run_or_say_what_they_need(document, call, folder):
    written: set[str] = set()
    for command in shell_commands(document):
        if command.needs:
            continue
        found = own_arguments(command)
        if found is None:
            assert Path(command.words[0]).name not in EXTERNAL | {"python"}, f"{command}: is not run; mark its block"
            continue
        arguments, processes = found
        assert processes == 1, f"{command}: takes several processes; mark its block"
        if is_help(arguments):
            assert call(arguments)[0] == 0
            continue
        name, _ = cli.command_name(list(arguments))
        if name in COMPOSED and "--dry-run" not in arguments and "dry_run=true" not in arguments:
            assert (ROOT / COMPOSED[name]).is_file()
            continue
        if name in ("analyze", "bench", "calibrate", "evaluate"):
            forget_former(arguments, folder, written)
        status, err = call([*in_folder(arguments, folder), *SMALLER.get(name, ())])
        assert status == 0, f"{command}\n{err}"


# --- the test itself ------------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "page.md"
    path.write_text(text)
    return os.path.relpath(path, ROOT)


def test_blocks_by_hand(tmp_path):
    text = (
        "a\n<!-- needs: gpu, weights (8B) -->\n```bash\nmake x  # w\nA=1 skipvision y \\\n  b='c d' && ls > out\n"
        "for i in 3 4; do\n  skipvision z=$i a=${b}\ndone\n```\n```\nz\n```\n"
    )
    page = written(tmp_path, text)
    marked, plain = blocks(page)
    assert marked == Block(page, 3, "bash", marked.text, ("gpu", "weights"), "8B")
    assert (plain.language, plain.text, plain.needs, plain.line) == ("", "z\n", (), 11)
    assert [(command.environment, command.words) for command in shell_commands(page)] == [
        ({}, ("make", "x")),
        ({"A": "1"}, ("skipvision", "y", "b=c d")),
        ({}, ("ls",)),
        ({}, ("for", "i", "in", "3", "4")),
        ({}, ("skipvision", "z=3", "a=${b}")),
        ({}, ("done",)),
    ]
    assert shell_commands(page)[1].place == f"{page}:5"


@pytest.mark.parametrize(
    "line",
    [
        "skipvision generate checkpoint=x prmpt=y",
        "skipvision train experiment=sv_coss",
        "skipvision train experiment=sv_cos trainer.global_batch=100",
        "torchrun --nproc_per_node=3 -m skipvision_train train experiment=sv_cos",
        "python benchmarks/prefill.py --visuals 576",
        "python benchmarks/prefil.py",
        "make tset",
        "launch/slurm.sh",
        "rm -rf outputs",
    ],
)
def test_wrong_commands_are_found(line, tmp_path, composed):
    (command,) = shell_commands(written(tmp_path, f"```bash\n{line}\n```\n"))
    with pytest.raises((Exception, SystemExit)):
        checked(command, composed)


def test_paths_are_moved(tmp_path):
    words = ["root=/data", "x=[/models/a,/models/b]", "y=outputs/data/z"]
    assert in_folder(words, Path("/w")) == ["root=/w/data", "x=[/w/models/a,/w/models/b]", "y=outputs/data/z"]
