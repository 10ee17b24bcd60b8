"""How likely given answers are: they are forced token by token through ``generate``.

So every probability is the one that generation itself would have used: under a plan that evicts or drops tokens after
the prompt, behind the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from skipvision_train.adapters.chat import chat_messages
from skipvision_train.data.records import Turn
from skipvision_train.data.templates import get_template
from skipvision_train.errors import DataError
from skipvision_train.inference.decoding import Sampling


@dataclass(frozen=True)
class Likelihood:
    """Of one answer to one prompt.

    Attributes:
        log_prob: natural logarithm of its probability, the sum over its tokens; the token that ends an answer is not
            among them.
        is_greedy: every token is the likeliest one.
        tokens: their number.
    """

    log_prob: float
    is_greedy: bool
    tokens: int


def continuation_likelihoods(
    model: Any,
    inputs_of: Callable[[list[int]], Mapping[str, Tensor]],
    continuations: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
    batch_size: int | None = None,
) -> list[list[Likelihood]]:
    """Likelihoods of several answers to every prompt.

    Answers of one token are read off the prompt's last position, all of one prompt from one forward pass; every longer
    one is a row of its own.

    Args:
        model: one of transformers', in evaluation mode.
        inputs_of: the left-padded batch of the prompts with these indices; an index may occur several times.
        continuations: per prompt, per answer, its token ids.
        pad_id: what fills up rows.
        batch_size: rows per forward pass; None takes all at once.

    Raises:
        ValueError: an answer without tokens.
    """
    if any(not tokens for answers in continuations for tokens in answers):
        raise ValueError("the likelihood of an answer without tokens")
    found: list[list[Likelihood | None]] = [[None] * len(answers) for answers in continuations]
    rows: list[tuple[int, list[int]]] = []
    for prompt, answers in enumerate(continuations):
        long = [[answer] for answer, tokens in enumerate(answers) if len(tokens) > 1]
        single = [answer for answer, tokens in enumerate(answers) if len(tokens) == 1]
        if single:
            long = [[*long[0], *single], *long[1:]] if long else [single]
        rows += [(prompt, members) for members in long]
    size = batch_size or max(1, len(rows))
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        forced = [[list(continuations[prompt][answer]) for answer in members] for prompt, members in chunk]
        made = _force(model, inputs_of([prompt for prompt, _ in chunk]), forced, pad_id)
        for (prompt, members), likelihoods in zip(chunk, made, strict=True):
            for answer, likelihood in zip(members, likelihoods, strict=True):
                found[prompt][answer] = likelihood
    return [[likelihood for likelihood in answers if likelihood is not None] for answers in found]


@torch.no_grad()
def _force(
    model: Any, inputs: Mapping[str, Tensor], answers: list[list[list[int]]], pad_id: int
) -> list[list[Likelihood]]:
    """Per row one answer that is forced, the first, and any number of one token."""
    force = _Force(answers, pad_id, inputs["input_ids"].shape[1])
    steps = max(len(row[0]) for row in answers)
    model.generate(
        **inputs,
        **Sampling(steps).arguments(),
        eos_token_id=None,  # one inside of an answer would end it
        pad_token_id=pad_id,
        logits_processor=LogitsProcessorList([force]),
    )
    return [
        [
            Likelihood(float(force.sums[row][i]), force.greedy[row][i], len(tokens))
            for i, tokens in enumerate(row_answers)
        ]
        for row, row_answers in enumerate(answers)
    ]


class _Force(LogitsProcessor):
    """Adds up what the answers' tokens score, and leaves each row's first answer as the only choice."""

    def __init__(self, answers: list[list[list[int]]], pad_id: int, prompt_length: int) -> None:
        self.answers, self.pad_id, self.prompt_length = answers, pad_id, prompt_length
        self.sums = [[0.0] * len(row) for row in answers]
        self.greedy = [[True] * len(row) for row in answers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        due = [
            (row, index, tokens[step])
            for row, answers in enumerate(self.answers)
            for index, tokens in enumerate(answers)
            if step < len(tokens)
        ]
        logits = scores.float()
        rows = torch.tensor([row for row, _, _ in due], device=scores.device)
        tokens = torch.tensor([token for _, _, token in due], device=scores.device)
        reached = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
        likeliest = (logits.argmax(-1)[rows] == tokens).tolist()
        for (row, index, _), value, best in zip(due, reached, likeliest, strict=True):
            self.sums[row][index] += value
            self.greedy[row][index] &= best
        chosen = [answers[0][step] if step < len(answers[0]) else self.pad_id for answers in self.answers]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


def answer_ids(processor: Any, turns: Sequence[Turn], tiles: Sequence[int], text: str) -> list[int]:
    """An answer's tokens as our template writes them behind a prompt, without the one that ends it.

    Args:
        processor: ours.
        turns: ending with a question.
        tiles: of each image that the turns show.
        text: the answer.

    Raises:
        DataError: an empty answer, or turns that the template cannot express.
    """
    template, lengths = get_template(processor.template), [processor.tokens_of(count) for count in tiles]
    given = (processor.tokenizer, lengths, processor.image_token_id)
    prompt = template.encode_prompt(turns, *given).input_ids
    whole = template.encode([*turns, Turn("assistant", text)], *given).input_ids
    answer = whole[len(prompt) :]
    ids = answer[: len(answer) - 1 - answer[::-1].index(processor.end_id)]
    if whole[: len(prompt)] != prompt or not ids:
        raise DataError(f"answer {text!r:.80}: template {processor.template!r} does not write it behind its prompt")
    return ids


def chat_answer_ids(processor: Any, turns: Sequence[Turn], images: Sequence[Any], text: str) -> list[int]:
    """The same by the chat template of somebody else's processor; without one, behind a line break.

    Raises:
        DataError: an empty answer, or a template that writes a conversation other than as its prompt and the answer.
    """
    text = text.strip()
    if processor.chat_template is None:
        before = "\n".join(turn.text for turn in turns)
        written = f"{before}\n{text}"
    else:
        before, written = (
            processor.apply_chat_template(chat_messages(said, images), tokenize=False, add_generation_prompt=open_end)
            for said, open_end in ((turns, True), ([*turns, Turn("assistant", text)], False))
        )
        place = written.find(text, len(before))
        written = written[: place + len(text)] if place >= 0 else ""
    ids, whole = (processor.tokenizer(given, add_special_tokens=False)["input_ids"] for given in (before, written))
    if not text or not written.startswith(before) or whole[: len(ids)] != ids or len(whole) == len(ids):
        raise DataError(
            f"answer {text!r:.80}: {type(processor).__name__} does not write it behind what it writes as a prompt"
        )
    return list(whole[len(ids) :])
