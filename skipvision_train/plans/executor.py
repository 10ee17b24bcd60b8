"""The executor: runs any skip plan on any decoder of the LLaMA shape, on one model instance, undoably.

``attach`` sets ``forward`` on the decoder and on its layers, as instance attributes. Weights, parameter names, hooks
and classes stay as they are. The decoder then takes one more keyword, ``token_layout``. transformers hands keywords
that a decoder does not know down to its layers: so the index tensors of a plan, made once per forward, reach them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from skipvision_train.errors import PlanError
from skipvision_train.plans.attention import (
    ActiveQueries,
    add_rows,
    attend,
    backend_mask,
    rotary_function,
    select_queries,
)
from skipvision_train.plans.cache import check_evictable, evict, evicted_layer, visible_slots
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.plan import Kinds, LayerRule, SkipPlan, TokenKind

FAMILIES = ("llama", "mistral", "qwen2", "qwen2_5_vl", "qwen3")
"""transformers model families whose layer code was compared with this executor's. Others share the submodule names and
compute something else (attention sinks, residual multipliers, clipped queries), which no attribute check would find."""

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}

# In transformers 5.17 a layer's __call__ checkpoints whatever forward the instance has; in 5.23 the class's forward
# does it, which an instance forward replaces and so must do itself.
CHECKPOINTS_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)


@dataclass(frozen=True)
class PlanIndices:
    """The index tensors of one plan and one batch; one entry per distinct set of kinds, shared by the layers.

    Attributes:
        rules: the plan's rules, layer 0 first.
        queries: for each set of kinds without a query that occurs in the batch, who still asks.
        ffn_rows: for each set of kinds without FFN that occurs in the batch, (N,) int64 flat positions that run it.
    """

    rules: tuple[LayerRule, ...]
    queries: dict[Kinds, ActiveQueries]
    ffn_rows: dict[Kinds, Tensor]


def plan_indices(
    plan: SkipPlan, layout: TokenLayout, device: torch.device, visible: Tensor | None = None
) -> PlanIndices:
    """Make the index tensors of ``plan`` for ``layout`` on ``device``; ``visible`` as in :func:`select_queries`.

    A set of kinds of which the batch has no token gets no entry: its layers run their stock code.
    """
    queries, ffn_rows = {}, {}
    for kinds in {rule.no_attention for rule in plan.rules}:
        if layout.is_kind(kinds).any():
            queries[kinds] = select_queries(layout, kinds, device, visible)
    for kinds in {rule.no_ffn for rule in plan.rules}:
        if (inactive := layout.is_kind(kinds)).any():
            active = ~inactive & (layout.kinds != TokenKind.PAD)
            ffn_rows[kinds] = active.flatten().nonzero()[:, 0].to(device)
    return PlanIndices(plan.rules, queries, ffn_rows)


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
        for module in (self._decoder, *self._decoder.layers):
            previous = module.__dict__.pop("_stock_forward")
            del module.__dict__["forward"]
            if getattr(previous, "__func__", None) is not type(module).forward:  # it had a forward of its own
                module.__dict__["forward"] = previous
        del self._decoder.__dict__["_skip_plan"]
        self._decoder = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(model: nn.Module, plan: SkipPlan) -> Attachment:
    """Run ``plan`` on this model instance from now on.

    The decoder's forward takes ``token_layout`` (:class:`TokenLayout` or None) as a further keyword:

    * with a layout the call is a prefill or a training forward; the layout's padding, documents and, where the caller
      gives none, positions hold. Rows may be padded left or right. A layout on the CPU is best: what must be counted
      is counted there, and nothing waits for an accelerator.
    * without one the layers run their stock code: decoding text, onto an evicted cache too. As with stock transformers,
      left-padded rows need ``position_ids`` from the caller.
    * eviction needs a cache that the caller asked for (``past_key_values`` or ``use_cache=True``); a default of the
      model's configuration does not count, and no cache comes back then.

    A dense plan attaches nothing.

    Raises:
        PlanError: no decoder of the LLaMA shape, another depth than the plan's, or a plan attached already.
    """
    decoder = find_decoder(model)
    plan.check_depth(len(decoder.layers))
    if "_skip_plan" in decoder.__dict__:
        raise PlanError(
            f"plan {plan.name!r}: plan {decoder._skip_plan.name!r} is attached to this model; detach it first"
        )
    if plan.is_dense:
        return Attachment(plan, None)
    # Bound methods rather than closures: copy.deepcopy rebinds them to the copy.
    for module in (decoder, *decoder.layers):
        module.__dict__["_stock_forward"] = module.forward
        module.__dict__["forward"] = MethodType(_decoder_forward if module is decoder else _layer_forward, module)
    decoder.__dict__["_skip_plan"] = plan
    return Attachment(plan, decoder)


def find_decoder(model: nn.Module) -> Any:
    """The one submodule (or ``model`` itself) whose ``layers`` are decoder layers of the LLaMA shape.

    Raises:
        PlanError: there is none, with what the candidates lack, or there are several.
    """
    found, complaints = [], []
    for name, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        complaint = next(filter(None, (_complaint(i, layer) for i, layer in enumerate(layers))), None)
        if complaint is None:
            found.append((name, module))
        else:
            complaints.append(f"{name or type(module).__name__}: {complaint}")
    if len(found) == 1:
        return found[0][1]
    if found:
        names = ", ".join(name or type(model).__name__ for name, _ in found)
        raise PlanError(f"{type(model).__name__} has several decoders ({names}); pass the one that is meant")
    reason = "; ".join(complaints) or "no module has a list named 'layers'"
    raise PlanError(f"{type(model).__name__} has no decoder of the LLaMA shape: {reason}")


def _complaint(index: int, layer: nn.Module) -> str | None:
    """Why the executor cannot run a layer, or None."""
    where = f"layer {index} ({type(layer).__name__})"
    parts = dict(layer.named_children())
    if missing := sorted(LAYER_PARTS - set(parts)):
        return f"{where} has no {', '.join(missing)}"
    if extra := sorted(set(parts) - LAYER_PARTS):
        return f"{where} has {', '.join(extra)}, which a skip plan would leave out"
    attention = parts["self_attn"]
    if missing := sorted(ATTENTION_PARTS - {name for name, _ in attention.named_children()}):
        return f"{where} has no self_attn.{', self_attn.'.join(missing)}"
    modules = {cls.__module__ for cls in (*type(layer).__mro__, *type(attention).__mro__)}
    if not any(f"transformers.models.{family}.modeling_{family}" in modules for family in FAMILIES):
        return f"{where} is of none of the known families {', '.join(FAMILIES)}"
    if rotary_function(attention) is None:
        return f"{where} has no apply_rotary_pos_emb in its module"
    # Qwen2 decides per layer and says so on the attention module; Mistral's code reads its configuration.
    if (window := getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))) is not None:
        return f"{where} attends within a sliding window of {window}; a skip plan needs full attention"
    if attention.layer_idx != index:
        return f"{where} says that its layer_idx is {attention.layer_idx}"
    return None


def _layer_forward(
    layer: Any, hidden_states: Tensor, *args: Any, plan_indices: PlanIndices | None = None, **kwargs: Any
) -> Tensor:
    """The instance forward of a decoder layer: stock, unless its rule concerns some token of this batch."""
    if plan_indices is None:
        return layer._stock_forward(hidden_states, *args, **kwargs)
    rule = plan_indices.rules[layer.self_attn.layer_idx]
    queries = plan_indices.queries.get(rule.no_attention)
    ffn_rows = plan_indices.ffn_rows.get(rule.no_ffn)
    if queries is None and ffn_rows is None:
        return layer._stock_forward(hidden_states, *args, **kwargs)
    if layer.gradient_checkpointing and layer.training and not CHECKPOINTS_IN_CALL:
        run = partial(_run_layer, layer, rule, queries, ffn_rows, **{**kwargs, "past_key_values": None})
        return layer._gradient_checkpointing_func(run, hidden_states)
    return _run_layer(layer, rule, queries, ffn_rows, hidden_states, **kwargs)


def _run_layer(
    layer: Any,
    rule: LayerRule,
    queries: ActiveQueries | None,
    ffn_rows: Tensor | None,
    hidden: Tensor,
    **kwargs: Any,
) -> Tensor:
    """One decoder layer, (B, T, C) -> (B, T, C), of which some tokens skip the attention query, the FFN, or both."""
    normed = layer.input_layernorm(hidden)
    if queries is None:
        hidden = hidden + layer.self_attn(hidden_states=normed, **kwargs)[0]
    else:
        update = attend(layer.self_attn, normed, queries, kwargs["position_embeddings"], kwargs.get("past_key_values"))
        hidden = add_rows(hidden, queries.rows, update)
        if rule.bypass == "norm":
            hidden = add_rows(hidden, queries.bypassed, normed.flatten(0, 1).index_select(0, queries.bypassed))
    if ffn_rows is None:
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    active = hidden.flatten(0, 1).index_select(0, ffn_rows)[None]
    return add_rows(hidden, ffn_rows, layer.mlp(layer.post_attention_layernorm(active))[0])


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
        if (evicted := evicted_layer(past_key_values)) is not None:
            visible = visible_slots(evicted, attention_mask, _inputs(call).shape[1])
            attention_mask = _mask_for(decoder, visible, call)
        return decoder._stock_forward(attention_mask=attention_mask, **call)

    plan: SkipPlan = decoder._skip_plan
    if decoder.training and decoder.gradient_checkpointing:  # transformers keeps no cache then
        call |= {"past_key_values": None, "use_cache": False}
    elif plan.evict and past_key_values is None:
        call |= {
            "past_key_values": DynamicCache(config=decoder.config) if use_cache else None,
            "use_cache": use_cache is True,
        }
    _check_prefill(plan, token_layout, attention_mask, call)
    cache = call["past_key_values"]
    if cache is None or not plan.evict:
        return _prefill(decoder, token_layout, call)
    leaving = token_layout.is_kind(plan.evict)
    if plan.evict_when == "before_first_token":
        leaving[:, -1] = False
        if leaving.any():
            return _prefill_in_two(decoder, token_layout, leaving, call)
    outputs = _prefill(decoder, token_layout, call)
    if leaving.any():
        evict(cache, ~leaving & token_layout.attention_mask.bool())
    return outputs


def _inputs(call: dict[str, Any]) -> Tensor:
    """The input ids (B, T) or embeddings (B, T, C) of a decoder call, whichever there are."""
    return call["input_ids"] if call["inputs_embeds"] is None else call["inputs_embeds"]


def _mask_for(decoder: Any, visible: Tensor, call: dict[str, Any]) -> Tensor:
    """``visible`` (B, T, K) bool as a 4D mask for the decoder's attention backend."""
    dtype = decoder.embed_tokens.weight.dtype if call["inputs_embeds"] is None else call["inputs_embeds"].dtype
    return backend_mask(visible.to(_inputs(call).device), decoder.config._attn_implementation, dtype)


def _check_prefill(plan: SkipPlan, layout: TokenLayout, attention_mask: Tensor | None, call: dict[str, Any]) -> None:
    """Refuse a call with a layout that could only give wrong results.

    Raises:
        PlanError: the layout has another shape than the inputs; a mask that is not (B, T); a cache that is not empty,
            not a plain dynamic one, or meant for packed documents.
    """
    shape = tuple(_inputs(call).shape[:2])
    if tuple(layout.kinds.shape) != shape:
        raise PlanError(f"token_layout: covers {tuple(layout.kinds.shape)} positions, the inputs have {shape}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise PlanError(
            f"attention_mask: has {attention_mask.ndim} dimensions; with a token layout only (batch, length) works"
        )
    if call.get("output_attentions") and plan.layers_without_attention():
        raise PlanError("output_attentions: layers in which some tokens issue no query have no attention map to give")
    cache = call["past_key_values"]
    if cache is None:
        return
    check_evictable(cache)
    if (filled := cache.get_seq_length()) > 0:
        raise PlanError(f"token_layout: a prefill needs an empty KV cache, this one holds {filled} positions")
    if layout.document_ids is not None:
        raise PlanError(
            "token_layout: packed documents cannot be decoded; give one document per row and no document_ids"
        )
    last_is_padding = layout.kinds[:, -1] == TokenKind.PAD
    if plan.evict and plan.evict_when == "before_first_token" and last_is_padding.any():
        row = int(last_is_padding.int().argmax())
        raise PlanError(f"token_layout: row {row} ends with padding; evict before_first_token needs left padding")


def _prefill(decoder: Any, layout: TokenLayout, call: dict[str, Any]) -> Any:
    """The decoder's forward over a whole layout under the plan."""
    device = _inputs(call).device
    indices = plan_indices(decoder._skip_plan, layout, device)
    attention_mask = layout.attention_mask.to(device)
    # Layers whose queries are gathered mask by themselves; a (T, T) mask of documents is for the others.
    if layout.document_ids is not None and any(r.no_attention not in indices.queries for r in indices.rules):
        attention_mask = _mask_for(decoder, layout.to(device).visible(), call)
    if call["position_ids"] is None:
        call = {**call, "position_ids": layout.position_ids.to(device)}
    return decoder._stock_forward(attention_mask=attention_mask, plan_indices=indices, **call)


def _prefill_in_two(decoder: Any, layout: TokenLayout, leaving: Tensor, call: dict[str, Any]) -> Any:
    """Prefill all but the last position, evict ``leaving`` (B, T) bool, then run the last position on what is left.

    The last position itself stays in the cache, of whatever kind it is.

    Returns what one forward would: ``last_hidden_state`` covers all positions. Attention maps are left out.
    """
    device, cache, last = _inputs(call).device, call["past_key_values"], layout.kinds.shape[1] - 1
    return_dict = call.pop("return_dict", None)
    if call["position_ids"] is None:
        call["position_ids"] = layout.position_ids.to(device)

    def part(start: int, stop: int) -> dict[str, Any]:
        per_position = ("input_ids", "inputs_embeds", "position_ids")
        cut = {name: call[name] if call[name] is None else call[name][..., start:stop] for name in per_position}
        if call["inputs_embeds"] is not None:
            cut["inputs_embeds"] = call["inputs_embeds"][:, start:stop]
        return {**call, **cut, "return_dict": True}

    first = _prefill(decoder, layout.columns(0, last), part(0, last))
    evict(cache, (~leaving & layout.attention_mask.bool())[:, :last])
    visible = visible_slots(cache.layers[0], None, 1).to(device)
    indices = plan_indices(decoder._skip_plan, layout.columns(last, last + 1), device, visible)
    mask = _mask_for(decoder, visible, call)
    second = decoder._stock_forward(attention_mask=mask, plan_indices=indices, **part(last, last + 1))
    states = None
    if first.hidden_states is not None:
        states = tuple(torch.cat(pair, dim=1) for pair in zip(first.hidden_states, second.hidden_states, strict=True))
    outputs = BaseModelOutputWithPast(
        last_hidden_state=torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1),
        past_key_values=cache,
        hidden_states=states,
    )
    return outputs.to_tuple() if return_dict is False else outputs
