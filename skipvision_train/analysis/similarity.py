"""How alike the visual tokens of one level are: the similarity density of Skip-Vision's Figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skipvision_train.analysis.probe import Estimate, over_samples, plain, sample_kinds
from skipvision_train.calibration.samples import Sample
from skipvision_train.errors import DataError
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.rules import VISUAL

BINS = 100
"""Of the histogram in the JSON form, from -1 to 1."""


@dataclass(frozen=True)
class LevelSimilarity:
    """One level's tokens: of every token its mean cosine similarity to the others of its level and image.

    Attributes:
        name: of the level.
        tokens: of an image (or tile), mean over the samples.
        values: (all tokens of all samples,) fp32; those of a level with a single token, which has no others, are left
            out.
        means: (samples,) float64, each sample's mean; NaN where it has no value.
    """

    name: str
    tokens: float
    values: Tensor
    means: Tensor

    def estimate(self) -> Estimate:
        """The mean over samples with its interval."""
        return over_samples(self.means)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the mean and a histogram of ``BINS`` equal bins from -1 to 1."""
        counts = torch.histc(self.values.clamp(-1, 1), BINS, min=-1, max=1)
        return {
            "level": self.name,
            "tokens": self.tokens,
            **self.estimate().to_dict(),
            "standard_deviation": plain(self.values.std(correction=0)) if len(self.values) else None,
            "histogram": counts.long().tolist(),
        }


def mean_similarities(tokens: Tensor) -> Tensor:
    """Every token's mean cosine similarity to the other tokens of its image.

    By the sum of the unit vectors, so that no (n, n) matrix is made.

    Args:
        tokens: (B, n, C), any float dtype; computed in float64.

    Returns:
        (B, n) fp32; NaN where n is 1. An all-zero token resembles nothing: 0.
    """
    unit = F.normalize(tokens.double(), dim=-1)
    others = unit.sum(1, keepdim=True) - unit
    return ((unit * others).sum(-1) / (tokens.shape[1] - 1)).float()


@torch.no_grad()
def level_tokens(
    model: PreTrainedModel, sample: Sample, image_token_id: int | None = None
) -> list[tuple[str, list[Tensor]]]:
    """The visual tokens of a sample, by level: names, and a (B, n, C) per group of images of equal size.

    Of our models the connector's levels, before anything is merged, one image or tile per row. Of transformers' the one
    level there is: what stands at the image tokens of the decoder's input, each run of neighbouring ones an image (in
    LLaVA-NeXT its tiles and the newline tokens between them).

    Raises:
        DataError: the sample shows no image.
    """
    if isinstance(model, SkipVisionForConditionalGeneration):
        if "pixel_values" not in sample.inputs:
            raise DataError(f"record {sample.id}: shows no image, so there are no visual tokens to compare")
        levels = model.connector(model.vision_tower(sample.inputs["pixel_values"]))
        return [(name, [level]) for name, level in zip(level_names(model, len(levels)), levels, strict=True)]
    visual = torch.isin(sample_kinds(model, sample, image_token_id), torch.tensor([int(kind) for kind in VISUAL]))
    if not visual.any():
        raise DataError(f"record {sample.id}: shows no image, so there are no visual tokens to compare")
    embeds = decoder_input(model, sample)[0]
    return [("image features", [embeds[first : last + 1][None] for first, last in true_runs(visual)])]


def level_names(model: SkipVisionForConditionalGeneration, count: int) -> list[str]:
    """The levels of our connectors by their window side in patches, where they have one, else by number."""
    config: Any = model.config  # annotated as the base class in transformers
    connector = config.connector_config
    if isinstance(connector, ResamplerConfig):
        return [f"window {window}" for window in connector.windows]
    return ["visual tokens"] if count == 1 else [f"level {i}" for i in range(count)]


def true_runs(mask: Tensor) -> list[tuple[int, int]]:
    """First and last index of every run of True in (T,) bool."""
    edges = F.pad(mask.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), ((edges == -1).nonzero()[:, 0] - 1).tolist(), strict=True))


class _Seen(Exception):  # noqa: N818 (no error: it ends a forward that has served its purpose)
    """The decoder was called."""


def decoder_input(model: PreTrainedModel, sample: Sample) -> Tensor:
    """(1, T, C): the embeddings that the decoder gets, with the images in their places."""
    seen: list[Tensor] = []

    def note(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])
        raise _Seen

    handle = find_decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**sample.inputs, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    return seen[0]


def similarity_density(
    model: PreTrainedModel, samples: Sequence[Sample], image_token_id: int | None = None
) -> list[LevelSimilarity]:
    """Compare the tokens within every level, coarsest first.

    Args:
        model: ours or one of transformers', in ``eval`` mode.
        samples: each with an image.
        image_token_id: for a causal LM whose configuration names no image token.

    Raises:
        DataError: a sample without an image.
    """
    values: dict[str, list[list[Tensor]]] = {}
    sizes: dict[str, list[float]] = {}
    for sample in samples:
        for name, groups in level_tokens(model, sample, image_token_id):
            found = [mean_similarities(group).flatten().cpu() for group in groups if group.shape[1] > 1]
            values.setdefault(name, []).append(found)
            images = sum(len(group) for group in groups)
            sizes.setdefault(name, []).append(sum(group.shape[0] * group.shape[1] for group in groups) / images)
    levels = []
    for name, per_sample in values.items():
        joined = [torch.cat(found) if found else torch.empty(0) for found in per_sample]
        means = torch.stack([own.double().mean() for own in joined])  # NaN of nothing
        levels.append(LevelSimilarity(name, sum(sizes[name]) / len(samples), torch.cat(joined), means))
    return levels
