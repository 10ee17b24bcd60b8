"""A model that answers questions about images: ours, or a vision-language model of transformers under a plan."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from skipvision_train.adapters.apply import AppliedPlan, apply, visual_token_ids
from skipvision_train.adapters.chat import encode_chats
from skipvision_train.adapters.prompts import PromptReader
from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.config.plans import PlanSpec, build_plan, load_bank
from skipvision_train.data.collate import collate
from skipvision_train.errors import ConfigError, DataError, first_line
from skipvision_train.inference.conversation import Conversation, Picture
from skipvision_train.inference.decoding import Generated, Sampling, TextPieces, generate, on_device
from skipvision_train.inference.likelihood import Likelihood, answer_ids, chat_answer_ids, continuation_likelihoods
from skipvision_train.inference.loading import load_model
from skipvision_train.inference.replies import Reply
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind


class Assistant:
    """Answers questions, one or many at a time, under a plan that can be exchanged between two answers.

    Not made for several threads at once: plan and model are shared, so calls must come one after the other.

    Args:
        model: ours, or one of transformers' for images and text, in evaluation mode.
        processor: the model's.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model: Any = model
        self.processor: Any = processor
        self.is_ours = isinstance(model, SkipVisionForConditionalGeneration)
        own = model.plan if isinstance(model, SkipVisionForConditionalGeneration) else None
        self.own_plan: SkipPlan = own or dense().bind(len(find_decoder(model).layers))
        """The plan that the model was trained with; dense for other people's models."""
        self._applied: AppliedPlan | None = None

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        plan: SkipPlan | PlanSpec | str | Path | None = None,
        device: str | None = None,
        precision: str | None = None,
    ) -> Assistant:
        """Load a model directory.

        Args:
            checkpoint: one of ours, or of transformers.
            plan: a plan, the file of one, or what a configuration says; None is the model's own.
            device: as torch names it; None takes the GPU if there is one.
            precision: ``fp32``, ``bf16`` or ``fp16``; None keeps what the checkpoint was saved in.

        Raises:
            CheckpointError: no model directory, or an incomplete one.
            ConfigError: an unknown precision, or a device that this machine does not have.
            PlanError: a plan that does not fit the model, or a bank of another model.
        """
        model, processor, _ = load_model(str(checkpoint), device, precision)
        assistant = cls(model, processor)
        if isinstance(plan, PlanSpec):
            assistant.use(assistant.planned(plan))
        elif plan is not None:
            assistant.use(plan if isinstance(plan, SkipPlan) else SkipPlan.load(plan))
        return assistant

    # --- plans -----------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> SkipPlan:
        """What runs now."""
        return self._applied.plan if self._applied is not None else self.own_plan

    def planned(self, spec: PlanSpec) -> SkipPlan:
        """The plan for this model that a configuration names.

        Raises:
            ConfigError: it names none.
            PlanError: a bank of another model.
        """
        if spec.method == "bank":
            load_bank(spec, model_hash(self.model))
        return build_plan(spec, self.own_plan.num_layers, own=self.own_plan)

    def use(self, plan: SkipPlan) -> None:
        """Run under ``plan`` from now on.

        Raises:
            PlanError: it does not fit the model; the former one stays.
            ConfigError: the same of a plan with registers, which the model lacks.
        """
        former = self.plan
        if self._applied is not None:
            self._applied.detach()
            self._applied = None
        try:
            self._applied = apply(self.model, plan)
        except ValueError:
            self._applied = apply(self.model, former)
            raise

    @contextmanager
    def under(self, plan: SkipPlan) -> Iterator[None]:
        """Run under ``plan`` inside the block.

        Raises:
            PlanError, ConfigError: as :meth:`use`.
        """
        former = self.plan
        self.use(plan)
        try:
            yield
        finally:
            self.use(former)

    # --- answers ---------------------------------------------------------------------------------------------------

    def ask(self, text: str, images: Sequence[Picture] = (), sampling: Sampling | None = None) -> str:
        """The answer to one question, as text. See :meth:`Conversation.ask` and :meth:`reply`."""
        return self.reply(Conversation().ask(text, images), sampling).text

    def reply(self, conversation: Conversation, sampling: Sampling | None = None) -> Reply:
        """The next turn of a conversation.

        Raises:
            DataError: nothing is asked, or the template cannot express it.
        """
        return self.replies([conversation], sampling)[0]

    def replies(self, conversations: Sequence[Conversation], sampling: Sampling | None = None) -> list[Reply]:
        """The next turns of several conversations in one batch.

        Greedy answers do not depend on what else is in it but for rounding in 16 bits.

        Raises:
            DataError: as :meth:`reply`.
        """
        return self.answer(self.encode(conversations), sampling)

    def answer(self, inputs: Mapping[str, Tensor], sampling: Sampling | None = None) -> list[Reply]:
        """The next turns behind prompts that :meth:`encode` has made, which several plans can share."""
        return self._replies(inputs, self._generate(inputs, sampling or Sampling()))

    def stream(self, conversation: Conversation, sampling: Sampling | None = None) -> Stream:
        """The next turn, piece by piece.

        Raises:
            DataError: as :meth:`reply`; what goes wrong later is raised while iterating.
        """
        inputs, sampling = self.encode([conversation]), sampling or Sampling()

        def run(on_tokens: Callable[[Tensor], None], stopped: Callable[[], bool]) -> Reply:
            return self._replies(inputs, self._generate(inputs, sampling, on_tokens, stopped))[0]

        return Stream(TextPieces(self.processor.tokenizer), set(self.end_ids), run)

    def log_likelihoods(
        self,
        conversations: Sequence[Conversation],
        continuations: Sequence[Sequence[str]],
        batch_size: int | None = None,
    ) -> list[list[Likelihood]]:
        """How likely each of several answers is as the next turn, under the plan.

        An answer is tokenized as the template writes it behind the prompt; the token that ends answers is left out.

        Args:
            conversations: each ends with a question.
            continuations: the answers to each of them.
            batch_size: rows per forward pass, which changes nothing but rounding; None takes all at once.

        Raises:
            DataError: as :meth:`reply`, or an answer that the template cannot write.
            ValueError: not one list of answers for every conversation.
        """
        for conversation in conversations:
            conversation.check()
        ids = [
            [self._answer_ids(conversation, text) for text in texts]
            for conversation, texts in zip(conversations, continuations, strict=True)
        ]
        return continuation_likelihoods(
            self.model, lambda rows: self.encode([conversations[row] for row in rows]), ids, self.pad_id, batch_size
        )

    def _answer_ids(self, conversation: Conversation, text: str) -> list[int]:
        if not self.is_ours:
            return chat_answer_ids(self.processor, conversation.turns, conversation.images, text)
        tiles = [self.processor.tiles_of(*image.size) for image in conversation.images]
        return answer_ids(self.processor, conversation.turns, tiles, text)

    # --- tensors ---------------------------------------------------------------------------------------------------

    def encode(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Left-padded prompts on the model's device.

        Raises:
            ConfigError: the processor cannot show images, or not pad several prompts.
            DataError: as :meth:`reply`.
        """
        for conversation in conversations:
            conversation.check()
        if self.is_ours:
            examples = [self.processor.encode_prompt(c.turns, c.images) for c in conversations]
            return on_device(self.model, collate(examples, padding_side="left", pad_id=self.pad_id))
        try:
            inputs = encode_chats(self.model, self.processor, [(c.turns, c.images) for c in conversations])
        except ConfigError:
            raise
        except ValueError as error:
            raise DataError(
                f"conversation: {type(self.processor).__name__} cannot write it: {first_line(error)}"
            ) from error
        return on_device(self.model, inputs)

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        if self.is_ours:
            return [self.processor.end_id]
        configured = self.model.generation_config.eos_token_id
        if configured is None:
            configured = self.processor.tokenizer.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return [int(token) for token in ends if token is not None]

    @property
    def pad_id(self) -> int:
        """What padding is filled with."""
        if self.is_ours:
            return int(self.processor.pad_id)
        pad = self.processor.tokenizer.pad_token_id
        return int(pad) if pad is not None else next(iter(self.end_ids), 0)

    def kinds(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, T) int64 :class:`TokenKind` of encoded prompts."""
        if self.is_ours:
            return inputs["token_kinds"]
        if not any(name.startswith("pixel_values") for name in inputs):
            ids: tuple[int, ...] = ()
        else:
            ids = visual_token_ids(self.model)
        return PromptReader(ids).kinds(inputs["input_ids"], inputs.get("attention_mask"))

    def prefill_flops(self, prompt: Mapping[str, int]) -> float:
        """FLOPs of the decoder layers for a prompt under the plan that runs now (``analysis.flops``).

        Args:
            prompt: positions per kind, as :attr:`Reply.prompt` has them.
        """
        counts = {TokenKind[name.upper()]: number for name, number in prompt.items()}
        return sequence_flops(find_decoder(self.model).config, counts, self.plan).total

    def _generate(
        self,
        inputs: Mapping[str, Tensor],
        sampling: Sampling,
        on_tokens: Callable[[Tensor], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Generated:
        return generate(self.model, inputs, sampling, self.end_ids, self.pad_id, on_tokens, stopped)

    def _replies(self, inputs: Mapping[str, Tensor], found: Generated) -> list[Reply]:
        ends, rows = set(self.end_ids), []
        for tokens, kinds in zip(found.tokens.tolist(), self.kinds(inputs).tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            text = self.processor.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
            counts = Counter(kinds)
            rows.append(
                Reply(
                    text=text,
                    finished=tokens[length - 1] in ends,
                    tokens=length,
                    prompt={k.name.lower(): counts[int(k)] for k in TokenKind if k != TokenKind.PAD and counts[int(k)]},
                    first_token_ms=found.first_token_ms,
                    decode_ms=found.decode_ms,
                    kv_bytes=found.kv_bytes / len(found.tokens),
                )
            )
        return rows


class Stream:
    """An answer on its way: iterate over its pieces of text; ``reply`` is there when they have come.

    The model runs in a thread of its own. Leaving a ``with`` block, or :meth:`close`, ends the answer where it is.
    """

    def __init__(
        self,
        pieces: TextPieces,
        ends: set[int],
        run: Callable[[Callable[[Tensor], None], Callable[[], bool]], Reply],
    ) -> None:
        self.reply: Reply | None = None
        self._pieces, self._ends, self._run = pieces, ends, run
        self._tokens: SimpleQueue[int | None] = SimpleQueue()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._answer, name="skipvision-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        while (token := self._tokens.get()) is not None:
            if token not in self._ends and (text := self._pieces.add(token)):
                yield text
        self._thread.join()
        if self._error is not None:
            raise self._error
        if text := self._pieces.rest():
            yield text

    def close(self) -> None:
        """End the answer and wait until the model is free."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> None:
        try:
            self.reply = self._run(lambda tokens: self._tokens.put(int(tokens[0])), self._stop.is_set)
        except BaseException as error:  # it belongs to whoever reads the pieces
            self._error = error
        finally:
            self._tokens.put(None)
