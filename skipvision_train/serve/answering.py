"""From a visitor's question to the model and back: what runs in the one thread that uses the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from skipvision_train.data.images import load_image
from skipvision_train.data.records import IMAGE_MARKER, ImageRef
from skipvision_train.errors import ConfigError
from skipvision_train.inference.assistant import Assistant
from skipvision_train.inference.conversation import Conversation
from skipvision_train.inference.decoding import Sampling
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.serve.limits import Limits, RefusalError
from skipvision_train.serve.queue import Job


class Answering:
    """Answers jobs (``queue.Answer``), one after the other.

    Args:
        assistant: the model.
        plans: by the name that visitors choose; each fits the model.
        sampling: of all answers.
        limits: ``tokens`` and ``prompt_tokens`` are used.
        system: a system message, or None.
    """

    def __init__(
        self,
        assistant: Assistant,
        plans: Mapping[str, SkipPlan],
        sampling: Sampling,
        limits: Limits,
        system: str | None = None,
    ) -> None:
        self.assistant, self.plans, self.sampling = assistant, plans, sampling
        self._limits, self._system = limits, system
        positions = find_decoder(assistant.model).config.max_position_embeddings - sampling.max_new_tokens
        if positions < 1:
            raise ConfigError(
                f"max_new_tokens: {sampling.max_new_tokens} leave no place for a prompt: the model has "
                f"{positions + sampling.max_new_tokens} positions"
            )
        self._prompt_tokens = min(limits.prompt_tokens, positions)
        # Templates of ours keep what spells a special token as text; other people's processors do not.
        special = [] if assistant.is_ours else [str(t) for t in assistant.processor.tokenizer.all_special_tokens]
        self._spellings = [IMAGE_MARKER, *(text for text in special if len(text) > 1)]

    def __call__(self, job: Job, give: Callable[[str], None]) -> dict[str, Any]:
        """Answer a question under its plan, piece by piece.

        Raises:
            RefusalError: 400, the prompt is too long.
            SkipVisionError: the model's template cannot write the conversation.
        """
        asked = Conversation.begin(self._system)
        for text, images, answer in job.said:
            asked = asked.ask(self.plain(text), [decoded(data) for data in images]).answered(self.plain(answer))
        asked = asked.ask(self.plain(job.text), [decoded(data) for data in job.images])
        self._check_length(job.text, asked)
        with self.assistant.under(self.plans[job.plan]):
            with self.assistant.stream(asked, self.sampling) as stream:
                for piece in stream:
                    give(piece)
                    if job.is_stopped:
                        break
            reply = stream.reply
            assert reply is not None, "the stream ended without an error and without a reply"
            flops = self.assistant.prefill_flops(reply.prompt)
        return {
            "text": reply.text,
            "plan": job.plan,
            "finished": reply.finished,
            "stopped": job.is_stopped and not reply.finished,
            "tokens": reply.tokens,
            "prompt": dict(reply.prompt),
            "first_token_ms": reply.first_token_ms,
            "decode_ms": reply.decode_ms,
            "kv_bytes": reply.kv_bytes,
            "prefill_flops": flops,
            "waited_ms": job.waited_ms,
        }

    def plain(self, text: str) -> str:
        """The text with a space in whatever would be read as an image or a special token."""
        return without_spellings(text, self._spellings)

    def _check_length(self, text: str, asked: Conversation) -> None:
        found = len(self.assistant.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if found > self._limits.tokens:
            raise RefusalError(400, f"text: {found} tokens; at most {self._limits.tokens}")
        found = self.assistant.encode([asked])["input_ids"].shape[1]
        if found > self._prompt_tokens:
            raise RefusalError(
                400,
                f"chat: {found} tokens with images and everything said before; at most {self._prompt_tokens}; "
                "start a new chat, or ask about fewer images",
            )


def without_spellings(text: str, spellings: list[str]) -> str:
    """The text with a space behind the first character of each of ``spellings``, until none is left."""
    pattern = re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))
    while pattern.search(text):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def decoded(data: bytes) -> Image.Image:
    """An uploaded image.

    Raises:
        DataError: no image, or one that ``load_image`` refuses.
    """
    return load_image(ImageRef(Path("image"), data=data), "upload")


def choices(assistant: Assistant, files: list[str]) -> dict[str, SkipPlan]:
    """The plans that visitors can choose: ``own``, ``dense``, and files under their names without ``.json``.

    Raises:
        ConfigError: two of the same name, or a plan with registers, which the model lacks.
        PlanError: a file that is no plan, or one that does not fit the model.
    """
    plans = {"own": assistant.own_plan, "dense": dense().bind(assistant.own_plan.num_layers)}
    for file in files:
        if (name := Path(file).stem) in plans:
            raise ConfigError(f"plans: {file}: there is a plan named {name!r} already; rename the file")
        plan = SkipPlan.load(file).bind(assistant.own_plan.num_layers)
        with assistant.under(plan):  # so that a misfit ends the start, not somebody's question
            plans[name] = plan
    return plans
