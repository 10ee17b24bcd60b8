"""``apply``: a skip plan on any vision-language model of transformers whose decoder is of the LLaMA shape.

``attach`` (``plans/executor.py``) runs a plan for a caller who knows what every token is. Here callers stay as they
are: a forward pre-hook on the model reads the layout from ``input_ids``, a second one hands it to the decoder. The
vision tower and the connector see nothing of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipvision_train.adapters.prompts import PromptReader, positions_of
from skipvision_train.errors import PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import Kinds, SkipPlan, TokenKind, TokenLayout, attach, find_decoder
from skipvision_train.plans.attention import backend_mask

PLACEHOLDER_FIELDS = ("image_token_id", "video_token_id")


class AppliedPlan:
    """A plan that runs on a model until :meth:`detach` or the end of a ``with`` block.

    Attributes:
        plan: the plan, bound to the model's depth.
    """

    def __init__(self, plan: SkipPlan, undo: ExitStack) -> None:
        self.plan = plan
        self._undo = undo

    def detach(self) -> None:
        """Give the model back as it was: no hook, no attribute stays. Detaching twice does nothing."""
        self._undo.close()

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def apply(
    model: nn.Module,
    plan: SkipPlan,
    *,
    image_token_id: int | Sequence[int] | None = None,
    register_token_id: int | None = None,
    text_only: bool = False,
    backend: str = "auto",
) -> AppliedPlan:
    """Run ``plan`` in every forward, training step and ``generate`` of ``model`` from now on.

    All visual tokens are of the kind ``SKIPPED``: nothing in such a model retains any. What is generated is text, also
    an image token (but ``generate(use_cache=False)`` sends it with the prompt again, and it counts as one there).
    Padding comes from the (batch, length) ``attention_mask``; where the caller gives no positions they count the real
    tokens, and positions of a model's own (mRoPE) are kept. With ``labels``, the tokens before each answer rank what a
    plan drops. Images may follow on a filled KV cache under a plan that neither drops nor evicts.

    A :class:`SkipVisionForConditionalGeneration` knows its token kinds: its plan is replaced, and put back by
    ``detach``.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, a causal LM of the
            LLaMA shape (with ``image_token_id``), or any of them in a wrapper.
        plan: of open depth or of the model's. A dense plan changes nothing and checks nothing.
        image_token_id: what stands in ``input_ids`` once per visual token; None reads it, and the video token, from
            the model's configuration.
        register_token_id: the token of learned registers (Victor), kind ``SUMMARY``: ordinary tokens of the prompt.
        text_only: with an ``image_token_id`` of the caller, batches without any image are meant, too.
        backend: what computes attention where the plan leaves something out, as in ``attach``.

    Raises:
        PlanError: the plan does not fit the model, or the token ids do not; forwards raise it where a call does not.
    """
    decoder = find_decoder(model)
    outer = _outermost(model, decoder)
    if isinstance(outer, SkipVisionForConditionalGeneration):
        if backend != "auto":
            raise PlanError(f"backend: {type(outer).__name__} chooses its own; leave backend={backend!r} out")
        return _replace_plan(outer, plan, image_token_id, register_token_id)
    bound = plan.bind(len(decoder.layers))
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(model, bound, backend))
        if attachment.active:
            reader = PromptReader(
                image_ids=_image_ids(outer, decoder, image_token_id),
                register_id=register_token_id,
                explicit=image_token_id is not None,
                text_only=text_only,
            )
            _check_plan(bound, outer, decoder, register_token_id)
            hooks = _Hooks(reader, type(outer).__name__)
            for module, hook in ((outer, hooks.before_model), (decoder, hooks.before_decoder)):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return AppliedPlan(bound, undo.pop_all())


class _Hooks:
    """The forward pre-hooks of one application; between them waits the layout of the running forward."""

    def __init__(self, reader: PromptReader, name: str) -> None:
        self._reader = reader
        self._name = name
        self._layout: TokenLayout | None = None

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the layout of a forward that holds more than text generated so far."""
        call = _by_name(model, args, kwargs)
        self._layout = self._reader.layout(call, _is_filled(call))

    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand the layout on, once. Onto a filled cache, positions follow from the mask as they did in the prefill."""
        call = _by_name(decoder, args, kwargs)
        layout, self._layout = self._layout, None
        filled = _is_filled(call)
        if layout is None and not filled:
            raise PlanError(
                f"{type(decoder).__name__} was called without {self._name}, so its plan does not know which tokens are "
                f"images; call {self._name}"
            )
        mask = call.get("attention_mask")
        if filled and call.get("position_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
            new = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            call["position_ids"] = positions_of(mask)[:, -new.shape[1] :]
        return (), call if layout is None else {**call, "token_layout": layout}


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, each under its parameter's name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _is_filled(call: Mapping[str, Any]) -> bool:
    """Whether a forward continues a KV cache that already holds tokens."""
    cache = call.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def _outermost(model: nn.Module, decoder: nn.Module) -> PreTrainedModel:
    """The outermost transformers model around ``decoder``: what ``generate`` calls, past any wrapper (PEFT) around."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(part is decoder for part in module.modules()):
            return module
    raise PlanError(f"{type(model).__name__}: its decoder stands in no transformers model; use attach and token_layout")


def _replace_plan(
    model: SkipVisionForConditionalGeneration,
    plan: SkipPlan,
    image_token_id: int | Sequence[int] | None,
    register_token_id: int | None,
) -> AppliedPlan:
    """Run our own model under ``plan`` until detached; it derives its token kinds by itself."""
    if image_token_id is not None or register_token_id is not None:
        raise PlanError(f"image_token_id: {type(model).__name__} knows its own tokens; leave the token ids out")
    former, undo = model.plan, ExitStack()
    model.set_plan(plan)
    undo.callback(model.set_plan, former)
    return AppliedPlan(model.plan, undo)


def visual_token_ids(model: nn.Module, given: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """What stands for visual tokens in the prompts of ``model``: the caller's ids, or those of its configuration.

    Raises:
        PlanError: there is none, or one is outside the vocabulary.
    """
    decoder = find_decoder(model)
    return _image_ids(_outermost(model, decoder), decoder, given)


def _image_ids(model: PreTrainedModel, decoder: Any, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The placeholder ids, the caller's or the configuration's.

    Raises:
        PlanError: there is none, or one is outside the vocabulary.
    """
    if given is None:
        found = [(f"config.{name}", getattr(model.config, name, None)) for name in PLACEHOLDER_FIELDS]
        named = [(where, token) for where, token in found if token is not None]
    else:
        named = [("image_token_id", token) for token in ([given] if isinstance(given, int) else given)]
    if not named:
        raise PlanError(
            f"image_token_id: the configuration of {type(model).__name__} names no image token; pass image_token_id"
        )
    for where, token in named:
        _check_in_vocabulary(where, token, decoder)
    return tuple(token for _, token in named)


def _check_in_vocabulary(where: str, token: int, decoder: Any) -> None:
    size = decoder.embed_tokens.num_embeddings
    if not 0 <= token < size:
        raise PlanError(
            f"{where}: {token} is outside the vocabulary of {size} tokens; pass the id that the processor puts into "
            "input_ids"
        )


def _check_plan(plan: SkipPlan, model: PreTrainedModel, decoder: Any, register_token_id: int | None) -> None:
    """Refuse a bound plan that this model cannot run, or of which a part would never do anything.

    Raises:
        PlanError: registers without their token, kinds that the model never has, an attention implementation without
            masks for a plan that needs them.
    """
    has = {TokenKind.TEXT, TokenKind.SKIPPED}
    if register_token_id is not None:
        _check_in_vocabulary("register_token_id", register_token_id, decoder)
        has.add(TokenKind.SUMMARY)
    elif plan.registers:
        raise PlanError(
            f"plan {plan.name!r}: needs {plan.registers} learned registers behind every image; pass register_token_id"
        )
    for where, kinds in _parts(plan):
        if kinds and not kinds & has:
            names = ", ".join(kind.name.lower() for kind in sorted(kinds))
            raise PlanError(
                f"plan {plan.name!r}: {where} concerns only {names} tokens, which {type(model).__name__} does not "
                "have; its visual tokens are all 'skipped' (and registers 'summary', with register_token_id)"
            )
    if plan.evict or plan.drops:  # refuse now an attention implementation that the first decoding step would refuse
        one_token = torch.ones(1, 1, 1, dtype=torch.bool)
        backend_mask(one_token, decoder.config._attn_implementation, decoder.embed_tokens.weight.dtype)


def _parts(plan: SkipPlan) -> list[tuple[str, Kinds]]:
    """Every set of kinds in a bound plan, and where it stands."""
    parts = [("evict", plan.evict)]
    parts += [(f"the drop at layer {drop.layer}", drop.kinds) for drop in plan.drops]
    for i, rule in enumerate(plan.rules):
        parts += [(f"no_attention of layer {i}", rule.no_attention), (f"no_ffn of layer {i}", rule.no_ffn)]
    return parts
