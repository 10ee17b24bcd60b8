"""Which decoders a plan can run on: those whose layer code was compared with the executor's."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipvision_train.errors import PlanError
from skipvision_train.plans.attention import rotary_function

FAMILIES = ("llama", "mistral", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""transformers model families whose layer code was compared with this executor's. Others share the submodule names and
compute something else (attention sinks, residual multipliers, clipped queries), which no attribute check would find."""

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}


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
