"""The moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipvision_train.errors import CheckpointError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

AVERAGE = "average.safetensors"
"""In a checkpoint: the average so far, fp32."""


class WeightAverage(TrainerCallback):
    """``average = decay average + (1 - decay) weight`` after every step, in fp32, beginning with the first weights.

    Every process keeps one, of all weights: under ZeRO-1 and ZeRO-2 each holds them whole.

    Args:
        model: with ``requires_grad`` set.
        decay: share of the average that a step keeps.
    """

    def __init__(self, model: SkipVisionForConditionalGeneration, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the weights as they are, unless :meth:`load` has found an average."""
        for name, parameter in self._training():
            value = self.average.get(name, parameter.detach().float())
            self.average[name] = value.to(parameter.device, copy=True)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is done."""
        for name, parameter in self._training():
            self.average[name].lerp_(parameter.float(), 1 - self.decay)

    def _training(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def save(self, directory: Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: value.contiguous() for name, value in self.average.items()}, directory / AVERAGE)

    def load(self, directory: Path) -> None:
        """Take it up.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        if not (directory / AVERAGE).is_file():
            raise CheckpointError(f"{directory}: holds no {AVERAGE}, which stage.ema_decay continues")
        self.average = load_file(directory / AVERAGE)

    def replace(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with the average in the place of those that train, in their types."""
        return averaged(state, self.average, self.model.all_tied_weights_keys)


def averaged(state: Mapping[str, Tensor], average: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """``state`` with the average in the place of the weights that it has, in their types.

    Args:
        state: of tied weights all names or one, whichever.
        average: knows tied weights by the name of the original.
        tied: name of the copy -> name of the original.
    """
    found = {
        name: average[own].to(value.dtype) if (own := tied.get(name, name)) in average else value
        for name, value in state.items()
    }
    return found | {copy: found[own] for copy, own in tied.items() if copy in found and own in found}
