"""Code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
)
"""Every document that tells a user to type something, relative to the repository."""

NEEDS = ("gpu", "processes", "weights", "data", "network", "cluster", "time")
"""What a block may need that a test has not got: a GPU; several processes; published weights; a data set that is not in
the repository; the network; a batch system; more than a minute."""

_FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[a-z, ]+?)(?: \((?P<reason>[^)]*)\))? -->\n\n?)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_JOINTS = {"&&", "||", "|", ";", "&"}
_KEYWORDS = {"do", "then", "else"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: relative to the repository.
        line: of the fence, from 1.
        language: behind the fence; empty for none.
        text: between the fences.
        needs: of the marker before it, ``<!-- needs: gpu, weights (LLaMA-3-8B) -->``; empty without one.
        reason: in the marker's brackets.
    """

    document: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A simple command: what stands between ``&&``, ``|`` and the like.

    Attributes:
        place: document and line.
        needs: of its block.
        environment: variables set before it.
        words: the command and its arguments, without redirections.
    """

    place: str
    needs: tuple[str, ...]
    environment: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def blocks(document: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    content = (ROOT / document).read_text()
    found = []
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start("language")) + 1
        needs = tuple(word.strip() for word in (match["needs"] or "").split(",") if word.strip())
        found.append(Block(document, line, match["language"], match["text"], needs, match["reason"] or ""))
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block: comments left out, continued lines joined, loops as their first round."""
    values: dict[str, str] = {}
    for number, line in _lines(block):
        for command in _simple(line, f"{block.document}:{number}", block.needs):
            if command.words[0] == "for":
                values[command.words[1]] = command.words[3]
            words = (re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), word) for word in command.words)
            yield replace(command, words=tuple(words))


def console_commands(block: Block) -> Iterator[Command]:
    """The commands behind ``$`` in a block that shows a terminal."""
    for number, line in _lines(block):
        if line.startswith("$ "):
            yield from _simple(line.removeprefix("$ "), f"{block.document}:{number}", block.needs)


def _lines(block: Block) -> Iterator[tuple[int, str]]:
    """Lines with their numbers in the document, continued ones joined."""
    lines = block.text.splitlines()
    start = 0
    while start < len(lines):
        end = start
        while lines[end].endswith("\\") and end + 1 < len(lines):
            end += 1
        yield block.line + 1 + start, " ".join(part.removesuffix("\\") for part in lines[start : end + 1])
        start = end + 1


def _simple(line: str, place: str, needs: tuple[str, ...]) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _JOINTS:
            words.append(word)
            continue
        while words and words[0] in _KEYWORDS:
            words.pop(0)
        while (at := next((i for i, each in enumerate(words) if set(each) <= set("<>&")), None)) is not None:
            del words[at : at + 2]
        environment = {}
        while words and re.match(r"[A-Z_][A-Z0-9_]*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words:
            yield Command(place, needs, environment, tuple(words))
        words = []


def shell_commands(document: str) -> list[Command]:
    """The commands of all blocks marked ``bash``."""
    return [command for block in blocks(document) if block.language == "bash" for command in commands(block)]


def inline_commands(document: str) -> Iterator[tuple[str, str]]:
    """``skipvision ...`` in running text, with at least one override and nothing left out: place and text."""
    content = (ROOT / document).read_text()
    prose = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), content)
    for match in re.finditer(r"`(?:\$ )?(skipvision [a-z][^`]*=[^`]*)`", prose):
        text = " ".join(match[1].split())
        if "..." not in text and "<" not in text and not re.search(r"=( |$)|\bN\b|FILE|\|", text):
            yield f"{document}:{content.count(chr(10), 0, match.start()) + 1}", text
