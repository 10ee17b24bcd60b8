"""What trains in a stage and at which rate: parts of the model, explicit freezing, optimizer groups."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipvision_train.config.specs import RatesSpec
from skipvision_train.errors import ConfigError

log = logging.getLogger(__name__)

PARTS: Mapping[str, str] = {
    "vision": "vision_tower",
    "connector": "connector",
    "reducer": "reducer",
    "llm": "language_model",
}
"""Part of the configuration -> submodule of the model. Together they hold every parameter of it."""


@dataclass(frozen=True)
class PartReport:
    """One part of a model in a stage.

    Attributes:
        part: name in the configuration.
        parameters: number of scalars, shared ones once.
        rate: peak learning rate, or None where the part is frozen.
    """

    part: str
    parameters: int
    rate: float | None

    @property
    def trainable(self) -> int:
        """Scalars that train."""
        return 0 if self.rate is None else self.parameters

    def line(self) -> str:
        """One line for a log."""
        state = "frozen" if self.rate is None else f"learning rate {self.rate:g}"
        return f"{self.part:<10} {self.parameters:>14,} parameters, {state}"


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The submodule of every part.

    Raises:
        ValueError: the model has a parameter outside of all parts.
    """
    prefixes = tuple(f"{module}." for module in PARTS.values())
    if outside := [name for name, _ in model.named_parameters() if not name.startswith(prefixes)]:
        raise ValueError(f"{outside[0]} and {len(outside) - 1} more parameters belong to none of {', '.join(PARTS)}")
    return {part: model.get_submodule(name) for part, name in PARTS.items()}


def apply_rates(model: nn.Module, rates: RatesSpec) -> tuple[PartReport, ...]:
    """Freeze the parts without a rate, unfreeze the others, and log it with counts.

    Raises:
        ConfigError: no part that trains has parameters.
    """
    wanted: dict[str, float | None] = dataclasses.asdict(rates)
    reports = []
    for part, module in parts_of(model).items():
        module.requires_grad_(wanted[part] is not None)
        reports.append(PartReport(part, sum(p.numel() for p in module.parameters()), wanted[part]))
        log.info("%s", reports[-1].line())
    if not any(report.trainable for report in reports):
        given = [part for part, rate in wanted.items() if rate is not None]
        raise ConfigError(f"stage.lr: nothing trains; {', '.join(given)} has no parameters in this model")
    return tuple(reports)


def parameter_groups(
    model: nn.Module, rates: RatesSpec, weight_decay: float, vision_layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: one per part that trains, two where some of its parameters decay and others do not.

    Args:
        model: with ``requires_grad`` set by :func:`apply_rates`, weights not yet sharded.
        rates: the parts' learning rates.
        weight_decay: of matrices; vectors (norms, biases) do not decay.
        vision_layer_decay: factor from a block of the tower to the one before it; groups per block then.

    Returns:
        dicts with ``name`` (the part), ``params``, ``lr`` and ``weight_decay``; no empty group. The last one of a part
        has the part's own rate.
    """
    wanted: dict[str, float | None] = dataclasses.asdict(rates)
    groups = []
    for part, prefix in PARTS.items():
        split: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if name.startswith(f"{prefix}.") and parameter.requires_grad:
                share = 1.0
                if part == "vision" and vision_layer_decay is not None:
                    share = vision_layer_decay ** _below_the_top(model, name)
                split.setdefault((share, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        for (share, decay), params in sorted(split.items(), key=lambda item: item[0][0]):
            rate = wanted[part]
            groups.append({"name": part, "params": params, "lr": rate and rate * share, "weight_decay": decay})
    return groups


def _below_the_top(model: nn.Module, name: str) -> int:
    """How many blocks of the tower come after the parameter's; what is before all of them counts as one more."""
    tower = model.get_submodule(PARTS["vision"])
    blocks = len(tower.transformer.resblocks)  # type: ignore[union-attr, arg-type]
    if (found := re.search(r"\.resblocks\.(\d+)\.", name)) is not None:
        return blocks - 1 - int(found.group(1))
    return blocks
