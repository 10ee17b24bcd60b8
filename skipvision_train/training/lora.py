"""Low-rank adapters on the language model: peft's layers in place, plain weights at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from skipvision_train.config.specs import LoraSpec
from skipvision_train.errors import ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

log = logging.getLogger(__name__)

ADAPTERS = "adapters.safetensors"
"""Beside the finished model's weights: what was trained of the language model."""

_BASE, _DOWN, _UP = ".base_layer", ".lora_A.default", ".lora_B.default"


def add_adapters(model: SkipVisionForConditionalGeneration, lora: LoraSpec) -> None:
    """Freeze the language model and put adapters, which train, into its layers. They change nothing at first.

    Parameters keep their names but for a ``base_layer`` in those of the maps that have an adapter.

    Raises:
        ConfigError: peft is not installed, or a target is no linear map of the decoder's layers.
    """
    if find_spec("peft") is None:
        raise ConfigError("stage.lora: needs peft (pip install 'skipvision-train[peft]')")
    from peft import LoraConfig, inject_adapter_in_model

    decoder = model.language_model.model
    maps = {name.rpartition(".")[2] for name, module in decoder.layers.named_modules() if type(module) is nn.Linear}
    if wrong := sorted(set(lora.targets) - maps):
        raise ConfigError(
            f"stage.lora.targets: {wrong[0]} is no linear map of the layers; use {', '.join(sorted(maps))}"
        )
    model.language_model.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    inject_adapter_in_model(config, decoder)
    counts = [p.numel() for p in model.language_model.parameters() if p.requires_grad]
    log.info("adapters   %14s parameters of rank %d, in %d maps", f"{sum(counts):,}", lora.rank, len(counts) // 2)


def merged(state: Mapping[str, Tensor], lora: LoraSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain weights, W + alpha / rank B A in fp32 and back in the weight's type, and the adapters by themselves."""
    plain, adapters = {}, {}
    for name, value in state.items():
        if _DOWN in name or _UP in name:
            adapters[name] = value
        elif _BASE in name:
            own = name.replace(_BASE, "")
            if name.endswith(".weight"):
                part = name.removesuffix(f"{_BASE}.weight")
                down, up = (state[f"{part}{which}.weight"].float() for which in (_DOWN, _UP))
                value = (value.float() + lora.alpha / lora.rank * (up @ down)).to(value.dtype)
            plain[own] = value
        else:
            plain[name] = value
    return plain, {name: torch.clone(value).contiguous() for name, value in adapters.items()}


def plain_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model with adapters as :func:`merged` leaves them."""
    return {name.replace(_BASE, ""): shape for name, shape in shapes.items() if _DOWN not in name and _UP not in name}
