"""Low-rank adapters on the language model: peft's layers in place, plain weights at the end."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from skipvision_train.config.specs import LoraSpec
from skipvision_train.errors import ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

log = logging.getLogger(__name__)

ADAPTERS = "adapters.safetensors"
"""Beside the finished model's weights: what was trained of the language model."""

SETTINGS = "lora.json"
"""In a checkpoint with adapters: how they are merged."""

_BASE, _UP = ".base_layer", ".lora_B.default"
DOWN = ".lora_A.default"
"""In the names of an adapter's first factor."""


def add_adapters(model: SkipVisionForConditionalGeneration, lora: LoraSpec) -> None:
    """Freeze the language model and put adapters, which train, into its layers. They change nothing at first.

    Parameters keep their names but for a ``base_layer`` in those of the maps that have an adapter. With
    ``lora.quantize`` all linear maps of the layers hold 4 bits, on the GPU if there is one; the adapters begin at
    zero all the same, so that the model is the quantised one. A model on the meta device gets adapters only.

    Raises:
        ConfigError: peft or bitsandbytes is not installed, or a target is no linear map of the decoder's layers.
    """
    if find_spec("peft") is None:
        raise ConfigError("stage.lora: needs peft (pip install 'skipvision-train[peft]')")
    if lora.quantize is not None and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"stage.lora.quantize: {lora.quantize} needs bitsandbytes (pip install 'skipvision-train[qlora]')"
        )
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
    on_meta = next(decoder.parameters()).is_meta
    if lora.quantize is not None and not on_meta:
        _quantize(decoder.layers, lora.quantize, lora.double_quantize)
        decoder.is_loaded_in_4bit = True  # peft asks; transformers must not, it would refuse to move the model
        inject_adapter_in_model(config, decoder)
        del decoder.is_loaded_in_4bit
    else:
        inject_adapter_in_model(config, decoder, low_cpu_mem_usage=on_meta)
    counts = [p.numel() for p in model.language_model.parameters() if p.requires_grad]
    log.info("adapters   %14s parameters of rank %d, in %d maps", f"{sum(counts):,}", lora.rank, len(counts) // 2)


def _quantize(layers: nn.Module, kind: str, double: bool) -> None:
    from skipvision_train.training.quantized import hold_in_four_bits

    before = sum(p.nbytes for p in layers.parameters())
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    count = hold_in_four_bits(layers, kind, double, device)
    after = sum(value.nbytes for value in layers.state_dict().values())
    log.info("quantised  %14d maps of the layers to %s: %.3f GB, before %.3f", count, kind, after / 1e9, before / 1e9)


def merged(state: Mapping[str, Tensor], lora: LoraSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain weights, W + alpha / rank B A in fp32 and back in the weight's type, and the adapters by themselves.

    Of a map in 4 bits W is what it computes with, in the adapters' type: the adapters have learnt to go with that, and
    on the weights before quantisation they would make another model than the one that was trained.
    """
    quantised: set[str] = set()
    if lora.quantize is not None:
        from skipvision_train.training.quantized import unpacked

        state, quantised = unpacked(state)
    kind = next(value.dtype for name, value in state.items() if DOWN in name)
    plain, adapters = {}, {}
    for name, value in state.items():
        dtype = kind if name in quantised else value.dtype
        if DOWN in name or _UP in name:
            adapters[name] = value
        elif _BASE in name:
            own = name.replace(_BASE, "")
            if name.endswith(".weight"):
                part = name.removesuffix(f"{_BASE}.weight")
                down, up = (state[f"{part}{which}.weight"].to(value.device).float() for which in (DOWN, _UP))
                value = value.float() + lora.alpha / lora.rank * (up @ down)
            plain[own] = value.to(dtype)
        else:
            plain[name] = value.to(dtype)
    return plain, {name: torch.clone(value).contiguous() for name, value in adapters.items()}


def plain_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of a model's parameters as :func:`merged` leaves them; also in 4 bits, also sharded."""
    return {
        name.replace(_BASE, ""): shape for name, shape in _shapes(model).items() if DOWN not in name and _UP not in name
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shapes of all parameters. Under ZeRO-3 a shard's shape says nothing, in 4 bits that of the bytes."""
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    full = {f"{name}.weight": (module.out_features, module.in_features) for name, module in maps.items()}
    return {name: full.get(name, shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Held:
    """What a stage's model holds, with adapters or without.

    Attributes:
        parameters: scalars that are held in the precision of training.
        trainable: those that train.
        packed: bytes of the weights in 4 bits, which ``parameters`` leave out.
    """

    parameters: int
    trainable: int
    packed: float


def held(model: SkipVisionForConditionalGeneration, lora: LoraSpec | None) -> Held:
    """Count a model that is not sharded. On the meta device what will be held in 4 bits counts as if it were."""
    sizes = {name: math.prod(shape) for name, shape in _shapes(model).items()}
    trainable = sum(sizes[name] for name, p in model.named_parameters() if p.requires_grad)
    if lora is None or lora.quantize is None:
        return Held(sum(sizes.values()), trainable, 0.0)
    layers = "language_model.model.layers."
    maps = {name for name, module in model.named_modules() if name.startswith(layers) and isinstance(module, nn.Linear)}
    packed = sum(sizes[f"{name}.weight"] for name in maps if DOWN not in name and _UP not in name)
    # A scale for each block of 64: fp32, or 8 bits and a scale in fp32 for 256 of them.
    bits = 4 + (8 / 64 + 32 / (64 * 256) if lora.double_quantize else 32 / 64)
    return Held(sum(sizes.values()) - packed, trainable, packed * bits / 8)
