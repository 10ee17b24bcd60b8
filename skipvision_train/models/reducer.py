"""From the connector's levels to the language model's visual tokens: split, merge, summarise, put in order.

Shapes: I images, T tiles of all images together, n tokens, C channels of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from skipvision_train.models.merging import merge_tokens
from skipvision_train.models.selection import partition, top_salient
from skipvision_train.models.settings import ReducerConfig
from skipvision_train.models.summary import AdaptiveSummary
from skipvision_train.plans.transfer import upload


class ReducedImages(NamedTuple):
    """The visual tokens of several images.

    One tensor for all of them: ZeRO-3 counts the tensors that a module returns, and every rank must count as many,
    however many images its batch has.

    Attributes:
        tokens: (N, C), image after image.
        lengths: tokens of each image.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    def split(self) -> tuple[Tensor, ...]:
        """One (n_i, C) per image."""
        return self.tokens.split(self.lengths)


class Reducer(nn.Module):
    """Arranges every image's tokens as ``SkipVisionConfig.image_token_kinds()`` lays them out.

    ``retained | middle | former | skipped | last local | latter | registers`` (Skip-Vision, Fig. 4). Skipped and last
    local tokens are the local ones, merged if ``local_keep`` says so; merging orders them by falling similarity, so
    that the last local one is the most distinctive. Summary tokens come from one shared module, or from one each, which
    exist only if there is something to summarise. The registers (Victor) are learned embeddings, the same behind every
    image, which start from a normal of standard deviation 0.02.

    Merging, which has no weights, runs once per number of local tokens; each module with weights runs once for all
    images, whatever their sizes: under ZeRO-3 every rank must run the same modules equally often.

    Args:
        config: how tokens are split, what is merged and summarised, and how many registers there are.
        width: C.
    """

    def __init__(self, config: ReducerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        separate = config.summary == "both" and config.summary_layers == "separate"
        self.summary = None if config.summary == "none" else AdaptiveSummary(width)
        self.latter_summary = AdaptiveSummary(width) if separate else None
        self.registers = nn.Parameter(0.02 * torch.randn(config.registers, width)) if config.registers else None

    def forward(
        self, levels: Sequence[Tensor], saliency: Tensor | None = None, tiles: Sequence[int] | None = None
    ) -> ReducedImages:
        """Reduce the connector's output.

        Args:
            levels: one (T, n_l, C) per level, coarsest first.
            saliency: (T, n) of the patches, needed where ``split`` is ``saliency``.
            tiles: tiles of each image, the global view first; None means one each.

        Returns:
            n_i = ``len(image_token_kinds(tiles[i]))`` tokens per image.

        Raises:
            ValueError: tiles that are not as many as ``levels`` have, or that this split cannot take; no saliency.
        """
        tiles = [1] * len(levels[0]) if tiles is None else list(tiles)
        if sum(tiles) != len(levels[0]):
            raise ValueError(f"tiles: {sum(tiles)} of {len(tiles)} images, but the connector made {len(levels[0])}")
        retained, local = self._split(levels, saliency, tiles)
        parts = [retained]
        if self.config.split != "none":
            local = self._merge(local)
            former, latter = self._summaries(levels, retained, local)
            parts += [former, local, latter]
        if self.registers is not None:
            parts.append([self.registers.to(levels[0].dtype)] * len(tiles))
        images = [torch.cat(pieces) for pieces in zip(*(part for part in parts if part), strict=True)]
        return ReducedImages(torch.cat(images), tuple(map(len, images)))

    def _split(
        self, levels: Sequence[Tensor], saliency: Tensor | None, tiles: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image the tokens that are retained and the local ones, (n, C) each."""
        split = self.config.split
        if split in ("finest", "saliency") and max(tiles) > 1:
            raise ValueError(f"tiles: an image of {max(tiles)}; split {split} takes one tile per image")
        if split == "finest":
            if len(levels) < 2:
                raise ValueError(f"levels: found {len(levels)}, but skipping the finest level needs at least 2")
            return list(torch.cat(tuple(levels[:-1]), dim=1).unbind()), list(levels[-1].unbind())
        tokens = torch.cat(tuple(levels), dim=1)
        if split == "saliency":
            if saliency is None or self.config.retain is None:
                raise ValueError("saliency: split saliency ranks tokens by it, and there is none")
            kept, rest = partition(tokens, top_salient(saliency, self.config.retain))
            return list(kept.unbind()), list(rest.unbind())
        images = [image.flatten(0, 1) for image in tokens.split(tiles)]
        if split == "none":
            return images, []
        each = tokens.shape[1]
        return [image[:each] for image in images], [image[each:] for image in images]

    def _merge(self, local: list[Tensor]) -> list[Tensor]:
        """Merge every image's local tokens that are more than ``local_keep``."""
        keep, merged = self.config.local_keep, list(local)
        for count in sorted({len(tokens) for tokens in local}):
            if keep is None or count <= keep:
                continue
            same = [i for i, tokens in enumerate(local) if len(tokens) == count]
            together = merge_tokens(
                torch.stack([local[i] for i in same]),
                keep,
                order=self.config.merge_order,
                rounds=self.config.merge_rounds,
                weighted=self.config.merge_weighted,
            )
            for i, tokens in zip(same, together, strict=True):
                merged[i] = tokens
        return merged

    def _summaries(
        self, levels: Sequence[Tensor], retained: list[Tensor], local: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The former and the latter summary token of every image, (1, C) each; empty lists where there is none."""
        config = self.config
        over = {"retained": retained, "skipped": local}
        if config.split == "finest":
            over["middle"] = list(levels[-2].unbind())
        former = self.summary
        latter = self.summary if self.latter_summary is None else self.latter_summary
        return (
            _summarise(former, over[config.former_over]) if former is not None and config.has_former else [],
            _summarise(latter, over[config.latter_over]) if latter is not None and config.has_latter else [],
        )


def _summarise(summary: AdaptiveSummary, tokens: list[Tensor]) -> list[Tensor]:
    """One (1, C) of each (n_i, C), all in one call of the module."""
    lengths = [len(image) for image in tokens]
    if len(set(lengths)) == 1:
        return list(summary(torch.stack(tokens)).unbind())
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = pad_sequence(tokens, batch_first=True)
    return list(summary(padded, upload(mask, padded.device)).unbind())
