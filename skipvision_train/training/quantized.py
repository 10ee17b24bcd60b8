"""Linear maps that hold their weights in 4 bits (Dettmers et al. 2023, "QLoRA", Sec. 3): frozen, for adapters on top.

Imports bitsandbytes, an optional dependency: import this module only where a configuration asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from skipvision_train.errors import ConfigError

BLOCK = 64
"""Weights that share a scale."""

_FORMAT = ".weight.quant_state.bitsandbytes__"


class FourBitLinear(Linear4bit):
    """A linear map with a 4-bit weight, which computes in its input's type, under autocast in autocast's.

    Its state is exact: the packed weight, and beside it the scales and the table by which it is unpacked.

    Args:
        linear: whose weight (out, in) is quantised; its bias is kept as it is.
        kind: ``nf4`` or ``fp4``.
        double: hold the scales of blocks of 64 weights in 8 bits, not in fp32.
        device: where it is quantised and stays.
    """

    def __init__(self, linear: nn.Linear, kind: str, double: bool, device: torch.device) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=False, compress_statistics=double, quant_type=kind,
            device="meta",
        )  # fmt: skip
        self.bias = linear.bias
        packed: Any = Params4bit(
            linear.weight.detach(), requires_grad=False, compress_statistics=double, quant_type=kind, module=self
        )
        self.weight = packed.to(device)
        # The first input would set one type for all; and on some CPUs the weights would be packed otherwise for
        # inference, in a form that has no backward pass.
        self.compute_type_is_set = True
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: Tensor = super().forward(x)
        return result

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in torch, and the scales, which bitsandbytes would leave as they are."""
        scales, weight = _scales(state_dict, prefix), cast(Any, self.weight)
        own = {name: value for name, value in state_dict.items() if not name.startswith(f"{prefix}weight.")}
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        if scales:
            self.quant_state = weight.quant_state = QuantState.from_dict(scales, weight.device)
        else:
            missing_keys.append(f"{prefix}weight.absmax")


def _scales(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What unpacks the weight of the map whose names begin with ``prefix``."""
    start = f"{prefix}weight."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def hold_in_four_bits(layers: nn.Module, kind: str, double: bool, device: torch.device) -> int:
    """Replace every linear map below ``layers`` by a :class:`FourBitLinear`, one after the other.

    Returns:
        how many.

    Raises:
        ConfigError: a map's inputs are no whole number of blocks; bitsandbytes' kernel for the CPU (0.50.2) unpacks
            such a weight to wrong values.
    """
    maps = {name: module.in_features for name, module in layers.named_modules() if type(module) is nn.Linear}
    if odd := [name for name, width in maps.items() if width % BLOCK]:
        raise ConfigError(
            f"stage.lora.quantize: {kind} needs maps whose inputs are a multiple of {BLOCK}, but {odd[0]} has "
            f"{maps[odd[0]]}; use null"
        )
    for name in maps:  # not the modules: each one's weight is given up before the next one is quantised
        parent, _, child = name.rpartition(".")
        linear = layers.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(layers.get_submodule(parent), child, FourBitLinear(linear, kind, double, device))
    return len(maps)


def unpacked(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """A state with the 4-bit weights as the maps compute with them, in fp32 and on the CPU, and their names.

    What is not packed stays as it is.
    """
    packed = {name.partition(_FORMAT)[0] for name in state if _FORMAT in name}
    plain = {}
    for name, value in state.items():
        part, is_scale, _ = name.partition(".weight.")
        if is_scale and part in packed:
            continue
        if (part := name.removesuffix(".weight")) != name and part in packed:
            scales = QuantState.from_dict(_scales(state, f"{part}."), value.device)
            value = dequantize_4bit(value, scales).float().cpu()
        plain[name] = value
    return plain, {f"{part}.weight" for part in packed}
