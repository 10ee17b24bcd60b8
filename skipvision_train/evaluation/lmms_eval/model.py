"""lmms-eval's interface on top of :class:`~skipvision_train.inference.Assistant`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from tqdm import tqdm

from skipvision_train.config.plans import PlanSpec, load_bank
from skipvision_train.data.images import load_image, to_rgb
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.evaluation.lmms_eval.arguments import Generation, ModelArguments, place_images
from skipvision_train.inference import Assistant, Conversation
from skipvision_train.models.identity import model_hash
from skipvision_train.plans.plan import SkipPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One request, with its images still to be loaded.

    Attributes:
        task: the task's name.
        document: its number, for messages.
        text: the prompt.
        visuals: what the task shows; None is nothing.
    """

    task: str
    document: int
    text: str
    visuals: Callable[[], Sequence[Any] | None]

    def conversation(self) -> Conversation:
        """Decoded.

        Raises:
            DataError: naming task and document: something else than images, or one that cannot be read.
        """
        try:
            images = [_picture(visual) for visual in self.visuals() or ()]
            return Conversation().ask(place_images(self.text, len(images)), images)
        except DataError as error:
            raise DataError(f"{self.task}, document {self.document}: {error}") from error


class SkipVision(lmms):
    """A model under a plan, or under every task's plan of a bank. ``ModelArguments`` says what it takes.

    Greedy answers depend neither on the batch size nor on the number of processes.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        """Load the model.

        Raises:
            ConfigError: an argument that cannot work.
            CheckpointError: no model directory, or an incomplete one.
            PlanError: a plan that does not fit the model, or a bank of another model.
        """
        super().__init__()
        given = ModelArguments.read(arguments)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.assistant = Assistant.open(
            given.pretrained, given.plan, own_device(given.device, self.accelerator), given.precision
        )
        self._device = self.assistant.model.device
        self._plan = self.assistant.plan
        self._bank = None
        if given.bank is not None:
            self._bank = load_bank(PlanSpec("bank", path=given.bank), model_hash(self.assistant.model))
        self.batch_size, self.max_new_tokens = given.batch_size, given.max_new_tokens

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SkipVision:
        """As lmms-eval calls it; where ``--model_args`` and another option disagree, ``--model_args`` counts.

        Raises:
            ConfigError: text that is no list of ``name=value``; also as :meth:`__init__`.
        """
        try:
            given = simple_parse_args_string(arg_string)
        except ValueError as error:
            raise ConfigError(f"model_args: {arg_string!r}; write name=value,name=value") from error
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**added, **given})

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    def clean(self) -> None:
        """Free the accelerator's memory, for a judge on the same machine. The next request brings the model back."""
        self.assistant.model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # --- requests --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests.

        Raises:
            ConfigError: beam search or settings of the wrong form.
            DataError: something else than images, or one that cannot be read, naming task and document.
        """
        questions, settings = [], []
        for request in requests:
            text, wanted, visuals, document, task, split = request.args
            questions.append(self._question(text, visuals, document, task, split))
            settings.append(Generation.read(wanted, self.max_new_tokens))
        return self._answers(questions, settings)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, in the order of the requests; what a round asks the task writes from the former.

        A round is a prompt of its own, as in the models of lmms-eval: the task says in its text what was answered.
        The requests that go on are answered together.

        Raises:
            ConfigError: as :meth:`generate_until`.
            DataError: as :meth:`generate_until`.
        """
        settings = [Generation.read(request.args[1], self.max_new_tokens) for request in requests]
        rounds: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        asked: dict[int, Question] = {}
        for row, request in enumerate(requests):
            text, _, visuals, _, document, task, split = request.args
            asked[row] = self._question(text, visuals, document, task, split)
        while asked:
            found = self._answers(list(asked.values()), [settings[row] for row in asked])
            for row, result in zip(asked, found, strict=True):
                rounds[row].append(result.text)
            asked = {
                row: question
                for row in asked
                if (question := self._next_round(requests[row], rounds, notes, row)) is not None
            }
        return rounds

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For every request the *negative* log-likelihood of the continuation as the answer, and whether it is greedy.

        lmms-eval takes the smallest of the first values as the model's choice, and turns bare tuples into text. The
        answer stands where training had it, without the delimiter that lmms-eval puts before it.

        Raises:
            ConfigError: the task wants likelihoods without a question.
            DataError: as :meth:`generate_until`.
        """
        questions, answers = [], []
        for request in requests:
            if len(request.args) != 6:
                raise ConfigError("metric acc_mutual_info: needs likelihoods without a question; use acc or acc_norm")
            text, target, visuals, document, task, split = request.args
            questions.append(self._question(text, visuals, document, task, split))
            answer = target if isinstance(target, str) else target(self._document(task, split, document))
            answers.append(str(answer).strip())

        def score(rows: list[int]) -> list[GenerationResult]:
            places: dict[tuple[str, int, str], list[int]] = {}
            for row in rows:  # the answers to one question share its images
                places.setdefault((questions[row].task, questions[row].document, questions[row].text), []).append(row)
            shown = [questions[members[0]].conversation() for members in places.values()]
            wanted = [[answers[row] for row in members] for members in places.values()]
            scored = self.assistant.log_likelihoods(shown, wanted, self.batch_size)
            found = {
                row: GenerationResult((-likelihood.log_prob, likelihood.is_greedy))
                for members, likelihoods in zip(places.values(), scored, strict=True)
                for row, likelihood in zip(members, likelihoods, strict=True)
            }
            return [found[row] for row in rows]

        return self._run(questions, [()] * len(questions), score)

    # --- their parts -----------------------------------------------------------------------------------------------

    def _document(self, task: str, split: str, document: int) -> Any:
        return self.task_dict[task][split][document]

    def _question(self, text: str, visuals: Any, document: int, task: str, split: str) -> Question:
        if visuals is None:
            return Question(task, document, text, lambda: None)
        return Question(task, document, text, lambda: visuals(self._document(task, split, document)))

    def _next_round(self, request: Instance, rounds: list[list[str]], notes: list[Any], row: int) -> Question | None:
        """What the task asks after ``rounds[row]``; None: it ends, and may have rewritten the answers."""
        _, _, _, write, document, task, split = request.args
        visuals, text, ends, answers, notes[row] = write(
            self._document(task, split, document),
            previous_output=list(rounds[row]),
            round_idx=len(rounds[row]),
            previous_round_info=notes[row],
        )
        rounds[row] = list(answers)
        return None if ends else Question(task, document, text, lambda: visuals)

    def _answers(self, questions: Sequence[Question], settings: Sequence[Generation]) -> list[GenerationResult]:
        def answer(rows: list[int]) -> list[GenerationResult]:
            wanted = settings[rows[0]]
            replies = self.assistant.replies([questions[row].conversation() for row in rows], wanted.sampling)
            return [
                GenerationResult(
                    wanted.cut(reply.text),
                    TokenCounts(input_tokens=sum(reply.prompt.values()), output_tokens=reply.tokens),
                )
                for reply in replies
            ]

        return self._run(questions, settings, answer)

    def _run(
        self, questions: Sequence[Question], keys: Sequence[Any], run: Callable[[list[int]], Sequence[T]]
    ) -> list[T]:
        """``run`` on batches of rows of equal plan and key; its results in the order of the questions."""
        self.assistant.model.to(self._device)
        groups: dict[tuple[SkipPlan, Any], list[int]] = {}
        for row, (question, key) in enumerate(zip(questions, keys, strict=True)):
            groups.setdefault((self._plan_of(question.task), key), []).append(row)
        results: dict[int, T] = {}
        with tqdm(total=len(questions), disable=self.rank != 0, desc="skipvision") as bar:
            for (plan, _), rows in groups.items():
                if plan != self.assistant.plan:
                    self.assistant.use(plan)
                for batch in _batches(rows, self.batch_size):
                    results.update(zip(batch, run(batch), strict=True))
                    bar.update(len(batch))
        return [results[row] for row in range(len(questions))]

    def _plan_of(self, task: str) -> SkipPlan:
        return self._plan if self._bank is None else self._bank.plan_for(task)


def own_device(wanted: str | None, accelerator: Any) -> str:
    """The device of this process.

    Raises:
        ConfigError: several processes, and a device that is not each process's own.
    """
    own = accelerator.device
    if accelerator.num_processes == 1:
        return wanted if wanted is not None else str(own)
    if wanted not in (None, own.type, str(own)):
        how = "; for the CPU set ACCELERATE_USE_CPU=true" if wanted == "cpu" else ""
        raise ConfigError(f"device: {wanted}, but {accelerator.num_processes} processes run on {own.type}{how}")
    return str(own)


def _picture(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return to_rgb(visual)
    if isinstance(visual, str):
        return load_image(visual, "of the task")
    raise DataError(f"the task shows {type(visual).__name__}; images are what this model takes")


def _batches(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
