"""Answers on a terminal or in a pipe: text as it comes, what it took, two plans side by side, a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import expanduser
from statistics import median
from typing import TextIO

from PIL import Image

from skipvision_train.data.images import load_image
from skipvision_train.data.records import IMAGE_MARKER
from skipvision_train.errors import DataError, SkipVisionError
from skipvision_train.inference.assistant import Assistant
from skipvision_train.inference.conversation import Conversation
from skipvision_train.inference.decoding import Sampling
from skipvision_train.inference.replies import Reply
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan

COMMANDS = {
    "/image FILE": "show an image with the next question; again for several",
    "/plan own|dense|FILE": "run under another plan; alone: which one runs",
    "/reset": "forget everything that was said and shown",
    "/quit": "leave",
}

_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Screen:
    """Where answers go.

    Attributes:
        out: answers.
        err: everything else.
        streams: pieces of text as they come, or whole answers.
        keeps_partial: Ctrl-C while an answer streams ends this answer alone.
    """

    out: TextIO
    err: TextIO
    streams: bool = False
    keeps_partial: bool = False

    def show(self, assistant: Assistant, conversation: Conversation, sampling: Sampling) -> Reply:
        """Ask, write the answer and a line break, and return the reply.

        Raises:
            DataError: the conversation cannot be asked.
        """
        if not self.streams:
            reply = assistant.reply(conversation, sampling)
            self._write(reply.text + "\n")
            return reply
        stream = assistant.stream(conversation, sampling)
        try:
            with stream:
                for piece in stream:
                    self._write(piece)
        except KeyboardInterrupt:
            if not self.keeps_partial or stream.reply is None:
                raise
        self._write("\n")
        assert stream.reply is not None  # otherwise iterating has raised
        return stream.reply

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        self.err.write(text + "\n")
        self.err.flush()

    def _write(self, text: str) -> None:
        # What a model writes could move the cursor or rename the window.
        self.out.write(text.translate(_CONTROL) if self.out.isatty() else text)
        self.out.flush()


def figures(reply: Reply, flops: float) -> str:
    """What a reply took, in a line.

    Args:
        reply: of a prompt alone.
        flops: of its prefill.
    """
    kinds = ", ".join(f"{number} {name}" for name, number in reply.prompt.items())
    steps = f", then {reply.decode_ms:.1f} ms each" if reply.decode_ms is not None else ""
    cut = "" if reply.finished else ", cut"
    return (
        f"prompt {sum(reply.prompt.values())} tokens ({kinds}), prefill {flops / 1e9:.2f} GFLOPs; "
        f"{reply.tokens} generated{cut}, the first after {reply.first_token_ms:.0f} ms{steps}; "
        f"KV cache {reply.kv_bytes / 2**20:.2f} MiB"
    )


def compare(assistant: Assistant, conversation: Conversation, sampling: Sampling) -> Iterator[str]:
    """The same question under the assistant's plan and dense: both answers, then a table of what they took.

    Each runs once for a few tokens before it is timed. The first token's time is the median of three turns, in which
    the plans take each other's place, so that a moment of other work does not decide. FLOPs are the decoder layers'.

    Raises:
        DataError: the conversation cannot be asked.
    """
    plans = [assistant.plan, dense().bind(assistant.plan.num_layers)]
    names = [plan.name for plan in plans]
    first = Sampling(max_new_tokens=min(2, sampling.max_new_tokens))
    turns: list[list[Reply]] = []
    for length in (first, first, first, sampling):
        turns.append([])
        for plan in plans:
            with assistant.under(plan):
                turns[-1].append(assistant.reply(conversation, length))
    flops = []
    for plan, reply in zip(plans, turns[-1], strict=True):
        with assistant.under(plan):
            flops.append(assistant.prefill_flops(reply.prompt))
    times = [median(reply.first_token_ms for reply in column) for column in zip(*turns[1:], strict=True)]
    replies = [replace(reply, first_token_ms=time) for reply, time in zip(turns[-1], times, strict=True)]
    for name, reply in zip(names, replies, strict=True):
        yield f"{name}:\n{reply.text}\n"
    yield from _table(names, _rows(replies, flops))


def _rows(replies: Sequence[Reply], flops: Sequence[float]) -> Iterator[tuple[str, Sequence[float | None], str]]:
    """Label, values and their format."""
    for kind in dict.fromkeys(kind for reply in replies for kind in reply.prompt):
        yield f"prompt, {kind} tokens", [reply.prompt.get(kind, 0) for reply in replies], ".0f"
    yield "generated tokens", [reply.tokens for reply in replies], ".0f"
    yield "prefill GFLOPs", [number / 1e9 for number in flops], ".2f"
    yield "first token ms", [reply.first_token_ms for reply in replies], ".1f"
    yield "ms per further token", [reply.decode_ms for reply in replies], ".1f"
    yield "KV cache MiB at the end", [reply.kv_bytes / 2**20 for reply in replies], ".2f"


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None], str]]) -> Iterator[str]:
    lines = [["", *names, "ratio"]]
    for label, (own, whole), form in rows:
        cells = ["-" if value is None else format(value, form) for value in (own, whole)]
        lines.append([label, *cells, f"{own / whole:.2f}" if own is not None and whole else "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for label, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([label.ljust(widths[0]), *right]).rstrip()


def typed_lines() -> Iterator[str]:
    """Lines from stdin: with a prompt and line editing on a terminal, else as they are.

    Raises:
        DataError: stdin is no UTF-8 text.
    """
    if not sys.stdin.isatty():
        try:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: not UTF-8 text: byte {error.object[error.start]:#04x}") from error
        return
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # importing it gives input() line editing and history
    while True:
        if not sys.stdout.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            return


@dataclass
class Chat:
    """A conversation line by line: questions, and the lines of ``COMMANDS``.

    What goes wrong with a line is said, and the conversation goes on as it was.

    Attributes:
        assistant: answers; its plan is exchanged by ``/plan``.
        screen: where to.
        sampling: how.
        system: of the conversation, also after ``/reset``.
        images: shown with the next question.
        stats: say what every answer took.
        failed: lines that went wrong so far.
    """

    assistant: Assistant
    screen: Screen
    sampling: Sampling
    system: str | None = None
    images: list[Image.Image] = field(default_factory=list)
    stats: bool = False
    failed: int = 0

    def __post_init__(self) -> None:
        self.conversation = Conversation.begin(self.system)

    def run(self, lines: Iterable[str]) -> None:
        """Until ``/quit`` or the end of the lines."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._command(*text.split(maxsplit=1))
                elif text:
                    self._ask(text)
            except SkipVisionError as error:
                self.failed += 1
                self.screen.note(f"error: {error}")

    def _ask(self, text: str) -> None:
        asked = self.conversation.ask(text, self.images)
        reply = self.screen.show(self.assistant, asked, self.sampling)
        if self.stats:
            self.screen.note(figures(reply, self.assistant.prefill_flops(reply.prompt)))
        if not reply.text:
            self.screen.note("(an empty answer; the question is taken back)")
            return
        said = reply.text.replace(IMAGE_MARKER, f"{IMAGE_MARKER[0]} {IMAGE_MARKER[1:]}")  # written, but nothing shown
        self.conversation, self.images = asked.answered(said), []

    def _command(self, name: str, value: str = "") -> None:
        if name == "/image" and value:
            self.images = [*self.images, load_image(_path(value), "of the chat")]
            count = len(self.images)
            self.screen.note(f"{count} image{'s' if count > 1 else ''} with the next question")
        elif name == "/plan":
            if value:
                self._use(value)
            self.screen.note(f"plan: {self.assistant.plan.name}")
        elif name == "/reset" and not value:
            self.conversation, self.images = Conversation.begin(self.system), []
            self.screen.note("nothing said, nothing shown")
        else:
            known = "; ".join(f"{command}: {what}" for command, what in COMMANDS.items())
            raise DataError(f"{name} {value}".strip() + f" is no command here; {known}")

    def _use(self, value: str) -> None:
        if value == "own":
            self.assistant.use(self.assistant.own_plan)
        elif value == "dense":
            self.assistant.use(dense())
        else:
            self.assistant.use(SkipPlan.load(_path(value)))


def _path(text: str) -> str:
    """A path as people type it, in quotes or below ``~``."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return expanduser(text)
