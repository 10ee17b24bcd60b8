"""The executor: runs any skip plan on any decoder of the LLaMA shape, on one model instance, undoably.

``attach`` sets ``forward`` on the decoder and on its layers, as instance attributes. Weights, parameter names, hooks
and classes stay as they are. The decoder then takes one more keyword, ``token_layout``. transformers hands keywords
that a decoder does not know down to its layers: so the index tensors of a plan, made once per forward, reach them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from skipvision_train.errors import PlanError
from skipvision_train.plans.attention import backend_mask
from skipvision_train.plans.backends import backend_for, check_backend
from skipvision_train.plans.cache import (
    EvictedLayer,
    check_evictable,
    check_step_mask,
    evict,
    evicted_layers,
    growing_cache,
    visible_slots,
)
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind
from skipvision_train.plans.run import DecodeRun, PlanRun, attention_forward, layer_forward
from skipvision_train.plans.transfer import upload


class Attachment:
    """A plan attached to a model, until :meth:`detach` or the end of a ``with`` block.

    Attributes:
        plan: the plan.
        active: whether the model was changed, so that its decoder takes ``token_layout``. False for a dense plan:
            the decoder is the stock one, and ``token_layout`` must not be passed.
    """

    def __init__(self, plan: SkipPlan, decoder: Any | None) -> None:
        self.plan = plan
        self._decoder = decoder

    @property
    def active(self) -> bool:
        return self._decoder is not None

    def detach(self) -> None:
        """Give the model its own forwards back. Detaching twice does nothing."""
        if self._decoder is None:
            return
        for module, _ in _changed(self._decoder):
            previous = module.__dict__.pop("_stock_forward")
            del module.__dict__["forward"]
            if getattr(previous, "__func__", None) is not type(module).forward:  # it had a forward of its own
                module.__dict__["forward"] = previous
        del self._decoder.__dict__["_skip_plan"], self._decoder.__dict__["_skip_backend"]
        self._decoder = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(model: nn.Module, plan: SkipPlan, backend: str = "auto", even_dense: bool = False) -> Attachment:
    """Run ``plan`` on this model instance from now on.

    The decoder's forward takes ``token_layout`` (:class:`TokenLayout` or None) as a further keyword:

    * with a layout the call is a prefill or a training forward; the layout's padding, documents and, where the caller
      gives none, positions hold. Rows may be padded left or right. A layout on the CPU is best: what must be counted
      is counted there, and nothing waits for an accelerator.
    * without one the layers run their stock code: decoding text, onto an evicted cache too. As with stock transformers,
      left-padded rows need ``position_ids`` from the caller.
    * eviction needs a cache that the caller asked for (``past_key_values`` or ``use_cache=True``); a default of the
      model's configuration does not count, and no cache comes back then.

    A dense plan attaches nothing, unless ``even_dense`` wants it for layouts that say what is read. ``backend``, of
    ``backends.BACKENDS``, computes attention where tokens are left out.

    Raises:
        PlanError: no decoder of the LLaMA shape, another depth than the plan's, a plan attached already, a backend that
            is unknown or not installed, layers on several devices; in forwards, a backend that cannot run there.
    """
    decoder = find_decoder(model)
    plan = plan.bind(len(decoder.layers))
    if "_skip_plan" in decoder.__dict__:
        raise PlanError(
            f"plan {plan.name!r}: plan {decoder._skip_plan.name!r} is attached to this model; detach it first"
        )
    check_backend(backend)
    if plan.is_dense and not even_dense:
        return Attachment(plan, None)
    _check_one_device(decoder, plan)
    # Bound methods rather than closures: copy.deepcopy rebinds them to the copy.
    for module, forward in _changed(decoder):
        module.__dict__["_stock_forward"] = module.forward
        module.__dict__["forward"] = MethodType(forward, module)
    decoder.__dict__["_skip_plan"], decoder.__dict__["_skip_backend"] = plan, backend
    return Attachment(plan, decoder)


def _check_one_device(decoder: Any, plan: SkipPlan) -> None:
    """Refuse layers that accelerate moves tensors for: a plan's index tensors stand on one device.

    Raises:
        PlanError: such layers.
    """
    if any("_hf_hook" in layer.__dict__ for layer in decoder.layers):
        raise PlanError(
            f"plan {plan.name!r}: the model's layers are spread over devices (device_map); a plan needs one, as "
            "device_map={'': 0} has it"
        )


def _changed(decoder: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """The modules that get a forward of their own, and which."""
    layers = [(layer, layer_forward) for layer in decoder.layers]
    attentions = [(layer.self_attn, attention_forward) for layer in decoder.layers]
    return [(decoder, _decoder_forward), *layers, *attentions]


def _decoder_forward(
    decoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    token_layout: TokenLayout | None = None,
    **kwargs: Any,
) -> Any:
    """The instance forward of the decoder: see :func:`attach`."""
    call = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
    call |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
    if token_layout is None:
        return _decode(decoder, attention_mask, call)

    plan: SkipPlan = decoder._skip_plan
    if decoder.training and decoder.gradient_checkpointing:  # transformers keeps no cache then
        call |= {"past_key_values": None, "use_cache": False}
    elif (plan.evict or plan.drops) and past_key_values is None:
        call |= {
            "past_key_values": growing_cache(decoder.config) if use_cache else None,
            "use_cache": use_cache is True,
        }
    layout = token_layout.to("cpu")
    _check_prefill(plan, layout, attention_mask, call)
    cache = call["past_key_values"]
    if cache is not None and cache.get_seq_length() > 0:
        return _continue(decoder, layout, attention_mask, call)
    if cache is None or not plan.evict:
        return _prefill(decoder, layout, call)
    leaving = layout.is_kind(plan.evict)
    if plan.evict_when == "before_first_token":
        leaving[:, -1] = False
        if leaving.any():
            return _prefill_in_two(decoder, layout, leaving, call)
    outputs = _prefill(decoder, layout, call)
    if leaving.any():
        evict(cache, ~leaving & layout.attention_mask.bool())
    return outputs


def _inputs(call: dict[str, Any]) -> Tensor:
    """The input ids (B, T) or embeddings (B, T, C) of a decoder call, whichever there are."""
    return call["input_ids"] if call["inputs_embeds"] is None else call["inputs_embeds"]


def _mask_for(decoder: Any, visible: Tensor, call: dict[str, Any]) -> Tensor:
    """``visible`` (B, T, K) bool as a mask for the decoder's attention implementation."""
    dtype = decoder.embed_tokens.weight.dtype if call["inputs_embeds"] is None else call["inputs_embeds"].dtype
    return backend_mask(visible.to(_inputs(call).device), decoder.config._attn_implementation, dtype)


def _run(decoder: Any, layout: TokenLayout, call: dict[str, Any], visible: Tensor | None = None) -> PlanRun:
    inputs = _inputs(call)
    _check_one_device(decoder, decoder._skip_plan)  # from_pretrained(device_map=...) places a model with its plan on
    # Attention maps come from stock layers alone, which want a mask over packed documents.
    name = "sdpa" if call.get("output_attentions") else decoder._skip_backend
    backend = backend_for(name, decoder, inputs, layout.document_ids is not None)
    return PlanRun(decoder._skip_plan, layout, inputs.device, backend, decoder.rotary_emb, visible)


def _check_prefill(plan: SkipPlan, layout: TokenLayout, attention_mask: Tensor | None, call: dict[str, Any]) -> None:
    """Refuse a call with a layout that could only give wrong results.

    Raises:
        PlanError: the layout has another shape than the inputs; a mask that is not (B, T); a cache that cannot do what
            the plan asks, that is filled though the plan drops or evicts, or that is meant for packed documents;
            renumbering of positions that have several dimensions; an image without the plan's registers.
    """
    shape = tuple(_inputs(call).shape[:2])
    if tuple(layout.kinds.shape) != shape:
        raise PlanError(f"token_layout: covers {tuple(layout.kinds.shape)} positions, the inputs have {shape}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise PlanError(
            f"attention_mask: has {attention_mask.ndim} dimensions; with a token layout only (batch, length) works"
        )
    if call.get("output_attentions") and (plan.layers_without_attention() or plan.drops):
        raise PlanError("output_attentions: layers in which some tokens issue no query have no attention map to give")
    if plan.registers:
        _check_registers(plan, layout)
    positions = call["position_ids"]
    if positions is not None and positions.ndim > 2 and any(drop.positions == "renumber" for drop in plan.drops):
        raise PlanError(
            f"plan {plan.name!r}: drops renumber positions, but this model's have {positions.ndim} dimensions (mRoPE); "
            "build the plan with positions='keep'"
        )
    cache = call["past_key_values"]
    if cache is None:
        return
    filled = cache.get_seq_length()
    if plan.evict or plan.drops:
        check_evictable(cache)
        if filled > 0:
            raise PlanError(
                f"token_layout: a prefill that drops or evicts needs an empty KV cache, this one holds {filled} "
                "positions; start again with the whole conversation"
            )
    elif filled > 0 and not isinstance(cache, DynamicCache):
        raise PlanError(
            f"KV cache: a {type(cache).__name__} that holds {filled} positions cannot take more images under a plan; "
            "pass a DynamicCache, or the whole conversation at once"
        )
    if layout.document_ids is not None:
        raise PlanError(
            "token_layout: packed documents cannot be decoded; give one document per row and no document_ids"
        )
    last_is_padding = layout.kinds[:, -1] == TokenKind.PAD
    if plan.evict and plan.evict_when == "before_first_token" and last_is_padding.any():
        row = int(last_is_padding.int().argmax())
        raise PlanError(f"token_layout: row {row} ends with padding; evict before_first_token needs left padding")


def _check_registers(plan: SkipPlan, layout: TokenLayout) -> None:
    visual = layout.is_kind(frozenset().union(*(drop.kinds for drop in plan.drops))).any(-1)
    lacking = visual & ((layout.kinds == TokenKind.SUMMARY).sum(-1) < plan.registers)
    if lacking.any():
        row = int(lacking.int().argmax())
        found = int((layout.kinds[row] == TokenKind.SUMMARY).sum())
        raise PlanError(
            f"plan {plan.name!r}: row {row} has an image and {found} registers (summary tokens), the plan needs "
            f"{plan.registers}; train the model with them, or use vtw"
        )


def _prefill(decoder: Any, layout: TokenLayout, call: dict[str, Any]) -> Any:
    """The decoder's forward over a whole layout under the plan."""
    device = _inputs(call).device
    run = _run(decoder, layout, call)
    run.unmasked = decoder.training and call["past_key_values"] is None and _needs_no_mask(decoder, layout, run)
    attention_mask: Tensor | None
    if run.unmasked:
        # Without a mask transformers would look at the positions, with one at its values, and the host would wait for
        # the device. One of four dimensions it passes on as it is, and layers under a plan do not take it.
        attention_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
    elif layout.document_ids is not None and run.stock_mask_needed():
        # Layers whose queries are gathered mask by themselves; a (T, T) mask of documents is for the others.
        attention_mask = _mask_for(decoder, layout.to(device).visible(), call)
    else:
        # Without padding the stock code needs no mask, and does not have to look at one to find that out.
        has_padding = (layout.kinds == TokenKind.PAD).any()
        attention_mask = upload(layout.attention_mask, device) if has_padding else None
    if call["position_ids"] is None:
        call = {**call, "position_ids": upload(layout.position_ids, device)}
    outputs = decoder._stock_forward(attention_mask=attention_mask, plan_run=run, **call)
    if call["past_key_values"] is not None:
        run.finish(call["past_key_values"])
    return outputs


def _needs_no_mask(decoder: Any, layout: TokenLayout, run: PlanRun) -> bool:
    """Whether stock attention, if it is causal by itself, shows no real token what it must not see.

    Behind the last real token padding is seen by no other, and what it sees itself does not matter in training.
    """
    if decoder.config._attn_implementation != "sdpa":
        return False
    if layout.document_ids is not None:
        return not run.stock_mask_needed()
    real = layout.attention_mask
    return bool((real[:, :-1] >= real[:, 1:]).all())


def _prefill_in_two(decoder: Any, layout: TokenLayout, leaving: Tensor, call: dict[str, Any]) -> Any:
    """Prefill all but the last position, evict ``leaving`` (B, T) bool, then run the last position on what is left.

    The last position itself stays in the cache, of whatever kind it is.

    Returns what one forward would: ``last_hidden_state`` covers all positions. Attention maps are left out.
    """
    device, cache, last = _inputs(call).device, call["past_key_values"], layout.kinds.shape[1] - 1
    return_dict = call.pop("return_dict", None)
    if call["position_ids"] is None:
        call["position_ids"] = upload(layout.position_ids, device)

    def part(start: int, stop: int) -> dict[str, Any]:
        per_position = ("input_ids", "inputs_embeds", "position_ids")
        cut = {name: call[name] if call[name] is None else call[name][..., start:stop] for name in per_position}
        if call["inputs_embeds"] is not None:
            cut["inputs_embeds"] = call["inputs_embeds"][:, start:stop]
        if (visual := call.get("visual_pos_masks")) is not None:  # Qwen3-VL's DeepStack: one row per visual token
            column = torch.arange(visual.shape[1], device=visual.device)
            rows = ((column >= start) & (column < stop)).expand_as(visual)[visual]
            cut["visual_pos_masks"] = visual[:, start:stop]
            cut["deepstack_visual_embeds"] = [embeds[rows] for embeds in call["deepstack_visual_embeds"]]
        return {**call, **cut, "return_dict": True}

    first = _prefill(decoder, layout.columns(0, last), part(0, last))
    evict(cache, (~leaving & layout.attention_mask.bool())[:, :last])
    second = _continue(decoder, layout.columns(last, last + 1), None, part(last, last + 1))
    states = None
    if first.hidden_states is not None:
        states = tuple(torch.cat(pair, dim=1) for pair in zip(first.hidden_states, second.hidden_states, strict=True))
    outputs = BaseModelOutputWithPast(
        last_hidden_state=torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1),
        past_key_values=cache,
        hidden_states=states,
    )
    return outputs.to_tuple() if return_dict is False else outputs


def _continue(decoder: Any, layout: TokenLayout, attention_mask: Tensor | None, call: dict[str, Any]) -> Any:
    """A step of several tokens, images among them, onto a filled cache, under the plan's rules.

    Args:
        decoder: the decoder.
        layout: of the new tokens.
        attention_mask: (B, filled + T) or None; the new tokens' padding is the layout's.
        call: the rest of the decoder's arguments.
    """
    cache, length = call["past_key_values"], layout.kinds.shape[1]
    evicted = evicted_layers(cache)
    if evicted:
        past = visible_slots(evicted[0], attention_mask, length)
    else:
        filled = cache.get_seq_length()
        real = torch.ones(len(layout.kinds), filled + length) if attention_mask is None else attention_mask
        past = real[:, None].bool().expand(-1, length, -1)
    past = past[..., :-length].cpu()
    visible = torch.cat([past, layout.visible()], dim=-1)
    run = _run(decoder, layout, call, visible)
    mask = _mask_for(decoder, visible, call)
    return decoder._stock_forward(attention_mask=mask, plan_run=run, **call)


def _decode(decoder: Any, attention_mask: Tensor | None, call: dict[str, Any]) -> Any:
    """A step of text: the stock forward, in which layers that hold less than the sequence mask what they hold."""
    evicted = evicted_layers(call["past_key_values"])
    if not evicted:
        return decoder._stock_forward(attention_mask=attention_mask, **call)
    length = _inputs(call).shape[1]
    check_step_mask(next(iter(evicted.values())), attention_mask, length)
    plain = length == 1 and (attention_mask is None or bool(attention_mask.all()))
    masks: dict[int, Tensor | None] = {}
    rotary: dict[int, tuple[Tensor, Tensor]] = {}
    made: dict[int, tuple[Tensor | None, tuple[Tensor, Tensor] | None]] = {}
    for index, layer in evicted.items():
        if id(layer.columns) not in made:
            visible = None if plain and not layer.padded else visible_slots(layer, attention_mask, length)
            mask = None if visible is None else _mask_for(decoder, visible, call)
            made[id(layer.columns)] = mask, _shifted_rotary(decoder, layer, call)
        masks[index], shifted = made[id(layer.columns)]
        if shifted is not None:
            rotary[index] = shifted
    if 0 in evicted:  # the stock code makes its mask for the first layer's length, and no layer needs another
        attention_mask = masks[0]
    return decoder._stock_forward(attention_mask=attention_mask, decode_run=DecodeRun(masks, rotary), **call)


def _shifted_rotary(decoder: Any, layer: EvictedLayer, call: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """cos and sin of new tokens in a layer whose positions were renumbered; None where they were not."""
    if layer.shift is None:
        return None
    inputs, positions = _inputs(call), call["position_ids"]
    if positions is None:
        start = layer.get_seq_length()
        positions = torch.arange(start, start + inputs.shape[1], device=inputs.device)[None]
    like = decoder.embed_tokens.weight[:1] if call["inputs_embeds"] is None else call["inputs_embeds"]
    return decoder.rotary_emb(like, positions - layer.shift.to(positions.device)[:, None])
