"""``skipvision generate``: answer a prompt, a file of prompts, or a chat, about images."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from skipvision_train.inference.assistant import Assistant
    from skipvision_train.inference.decoding import Sampling
    from skipvision_train.inference.terminal import Chat
    from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)

ON_ERROR = ("continue", "stop")


@dataclass
class Config:
    """Settings of ``skipvision generate``."""

    checkpoint: str = "???"
    """Model directory: one of ours, or of transformers for images and text."""
    prompt: str | None = None
    """What is asked. ``<image>`` stands where an image stands; without any marker the images come first."""
    image: list[str] = field(default_factory=list)
    """Image files in the order of their markers; with ``chat``, of the first question."""
    system: str | None = None
    """A system message before the prompt, the chat, or those prompts of ``input`` that bring none; null for none."""
    input: str | None = None
    """Instead of ``prompt``: a JSON-lines file of prompts."""
    output: str | None = None
    """With ``input``: the JSON-lines file of answers. What is there already is not asked again."""
    batch_size: int = 8
    """With ``input``: prompts that run together; does not change greedy answers but for rounding in 16 bits."""
    on_error: str = "continue"
    """With ``input``: a prompt that cannot be answered becomes a line with the reason (``continue``), or ends the run
    (``stop``)."""
    chat: bool = False
    """Instead of ``prompt``: questions from stdin, one a line, each with what was said before."""
    compare: bool = False
    """With ``prompt``: the answers under the plan and dense, and what both took."""
    plan: PlanSpec = field(default_factory=lambda: PlanSpec("own"))
    """The plan: a file of ``conf/plan`` and its fields, or a plan file's path; ``own`` is what the checkpoint has. Of a
    bank the prompts of ``input`` run under the plan of their ``task``."""
    max_new_tokens: int = 128
    """Where an answer without an end is cut."""
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens that together have this share."""
    top_k: int = 0
    """With a temperature: draw among so many tokens at most; 0 among all."""
    seed: int | None = None
    """Of the draws; null draws anew every time."""
    stream: bool | None = None
    """Write an answer as it comes; null does so on a terminal."""
    stats: bool = False
    """Say on stderr what an answer took: tokens by kind, FLOPs, times, memory. With ``input``: in every line."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""


def run(cfg: Config) -> None:
    """Load the model and answer on stdout, or in ``output``."""
    check(cfg)
    from skipvision_train.inference.assistant import Assistant
    from skipvision_train.inference.conversation import Conversation
    from skipvision_train.inference.decoding import Sampling
    from skipvision_train.inference.terminal import Chat, Screen, compare, figures

    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, cfg.seed)
    prompts = _count(cfg.input) if cfg.input is not None else 0
    asked = Conversation.begin(cfg.system)
    if cfg.prompt is not None:
        asked = asked.ask(cfg.prompt, cfg.image)
    assistant = Assistant.open(cfg.checkpoint, cfg.plan, cfg.device, cfg.precision)
    streams = sys.stdout.isatty() if cfg.stream is None else cfg.stream
    screen = Screen(sys.stdout, sys.stderr, streams, keeps_partial=cfg.chat and sys.stdin.isatty())
    if cfg.input is not None:
        _answer_file(cfg, assistant, sampling, prompts)
    elif cfg.chat:
        _chat(cfg, Chat(assistant, screen, sampling, cfg.system, stats=cfg.stats))
    elif cfg.compare:
        if assistant.plan.is_dense:
            raise ConfigError(f"compare: the plan {assistant.plan.name!r} leaves nothing out; choose one with plan=...")
        for line in compare(assistant, asked, sampling):
            sys.stdout.write(line + "\n")
    else:
        reply = screen.show(assistant, asked, sampling)
        if cfg.stats:
            screen.note(figures(reply, assistant.prefill_flops(reply.prompt)))


def check(cfg: Config) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        ConfigError: the first such field.
    """
    modes = [name for name in ("prompt", "input", "chat") if getattr(cfg, name) not in (None, False)]
    if not modes:
        raise ConfigError("prompt: needs a value; give prompt=..., input=FILE.jsonl output=FILE.jsonl, or chat=true")
    if len(modes) > 1:
        raise ConfigError(f"{modes[1]}: {getattr(cfg, modes[1])!r} with {modes[0]}; give one of prompt, input and chat")
    (mode,) = modes
    if mode == "prompt" and not str(cfg.prompt).strip() and not cfg.image:
        raise ConfigError("prompt: empty, and no image; ask something")
    if mode == "input" and cfg.output is None:
        raise ConfigError("output: needs a value beside input; name the file for the answers")
    only_in = {"output": "input", "compare": "prompt"}
    defaults = Config()
    for name, needed in only_in.items():
        if getattr(cfg, name) != getattr(defaults, name) and mode != needed:
            raise ConfigError(f"{name}: {getattr(cfg, name)!r} goes with {needed}, not with {mode}")
    if mode == "input" and cfg.image:
        raise ConfigError(f"image: {cfg.image} with input; every line of the file names its own images")
    if mode == "input" and cfg.stream:
        raise ConfigError("stream: true with input; answers of a file come in batches")
    if cfg.compare and cfg.stream:
        raise ConfigError("stream: true with compare; both answers are shown when they are whole")
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size: {cfg.batch_size}; at least 1")
    if cfg.on_error not in ON_ERROR:
        raise ConfigError(f"on_error: {cfg.on_error!r} is unknown; use {' or '.join(ON_ERROR)}")
    for name in ("prompt", "system"):
        text = getattr(cfg, name) or ""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no text of its locale
            raise ConfigError(f"{name}: no text at character {error.start}; write it in UTF-8") from error


def _count(path: str) -> int:
    """How many prompts the file holds."""
    from skipvision_train.data.prompts import prompt_lines

    source = Path(path)
    if source.exists() and not source.is_file():  # a pipe would be empty when its prompts are to be answered
        raise DataError(f"input: {path}: is no regular file; prompts are read twice")
    if not (found := sum(1 for _ in prompt_lines(source, "input"))):
        raise DataError(f"input: {path}: holds no prompts")
    return found


def _chat(cfg: Config, chat: Chat) -> None:
    """Raises DataError at the end if lines of a pipe went wrong: a script shall notice."""
    from skipvision_train.data.images import load_image
    from skipvision_train.inference.terminal import COMMANDS, typed_lines

    chat.images = [load_image(path, "of the prompt") for path in cfg.image]
    if sys.stdin.isatty():
        chat.screen.note("; ".join(COMMANDS))
    chat.run(typed_lines())
    if chat.failed and not sys.stdin.isatty():
        raise DataError(f"chat: {chat.failed} lines went wrong")


def _task_plans(spec: PlanSpec, assistant: Assistant) -> dict[str, SkipPlan]:
    """Of a bank without a chosen task the plan of every task; the assistant has the universal one."""
    from skipvision_train.config.plans import load_bank

    if spec.method != "bank" or spec.task is not None:
        return {}
    bank = load_bank(spec)  # whether it is this model's was checked when the model was opened
    return {task: bank.plans[task].bind(assistant.plan.num_layers) for task in sorted(bank.plans)}


def _answer_file(cfg: Config, assistant: Assistant, sampling: Sampling, prompts: int) -> None:
    """Raises DataError at the end if the output has error lines: a script shall notice."""
    from skipvision_train.inference import batch_files as files

    source, output = Path(str(cfg.input)), Path(str(cfg.output))
    universal, plans = assistant.plan, _task_plans(cfg.plan, assistant)
    digest = files.plan_digest([universal, *plans.values()])
    settings = files.run_settings(
        cfg.checkpoint, source, sampling, cfg.system, plan=digest, tasks=sorted(plans), precision=cfg.precision
    )
    with files.AnswerFile(output, settings) as answers:
        log.info(
            "%s: %d prompts; %s has %d lines already; plan %s", source, prompts, output, answers.kept, universal.name
        )
        done = files.answer_file(
            assistant,
            files.read_questions(source, cfg.system),
            answers,
            sampling,
            batch_size=cfg.batch_size,
            plan_of=lambda task: plans.get(task or "", universal),
            stops=cfg.on_error == "stop",
            details=cfg.stats,
            total=prompts,
        )
    log.info("%s: %d answers of %d tokens added", output, done.answered, done.tokens)
    if done.errors:
        raise DataError(
            f"input: {done.errors} of {prompts} prompts have no answer; the lines with 'error' in {output} say why"
        )
