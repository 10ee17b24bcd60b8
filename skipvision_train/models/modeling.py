"""The Skip-Vision model: CLIP, connector, reducer, and a LLaMA of transformers run under a skip plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipvision_train.errors import CheckpointError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import MqtConfig
from skipvision_train.models.connectors import build_connector
from skipvision_train.models.loss import predicted_losses
from skipvision_train.models.reducer import ReducedImages, Reducer
from skipvision_train.models.vision import ClipVisionTower
from skipvision_train.plans.attention import backend_mask
from skipvision_train.plans.executor import Attachment, attach
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind
from skipvision_train.plans.transfer import upload


@dataclass
class SkipVisionOutput(CausalLMOutputWithPast):
    """What transformers' models return, and ``token_losses``: (N,) float32 without a graph, the cross entropy of every
    supervised position, row by row; None without labels."""

    token_losses: Tensor | None = None


class SkipVisionForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model whose language model runs under a :class:`SkipPlan`.

    Args:
        config: every dimension, and the plan the model starts under (``config.skip_plan``).
        language_model: a causal LM to take over instead of building a random one (saves holding the weights twice).

    Shapes: B rows, T positions, I images of all rows together, N tiles of all images, C language model width.
    """

    config_class = SkipVisionConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers reads it off the class)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012 (transformers reads it off the class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: SkipVisionConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        vision, width = config.vision_config, config.text_config.hidden_size
        self.vision_tower = ClipVisionTower(vision, config.readout)
        self.connector = build_connector(config.connector_config, vision, width)
        self.reducer = Reducer(config.reducer_config, width)
        self.language_model = language_model or AutoModelForCausalLM.from_config(
            config.text_config, dtype=torch.get_default_dtype()
        )
        self._attachment: Attachment | None = None
        self._loss_kind, self._read_supervised = "plain", False
        self._plan = config.plan_or_dense()
        self.post_init()
        self.set_plan(self._plan)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model directory, strictly.

        Raises:
            CheckpointError: tensors are missing or unknown; nothing is filled in silently.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            if keys := sorted(info[problem]):
                more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
                raise CheckpointError(f"{args[0]}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}{more}")
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: vision tower, connector and reducer initialise themselves where they are built.

        transformers calls this for every module outside ``language_model``; its default would overwrite their weights.
        """

    @property
    def plan(self) -> SkipPlan:
        """The plan the language model runs under."""
        return self._plan

    def set_plan(self, plan: SkipPlan) -> None:
        """Run the language model under ``plan`` from now on; weights and configuration do not change.

        Raises:
            PlanError: the plan is written for another depth.
            ConfigError: the plan needs more registers than the model was trained with.
        """
        plan = self.config.fit_plan(plan)
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
        if not plan.is_dense or self._read_supervised:
            self._attachment = attach(self.language_model, plan, even_dense=self._read_supervised)
        self._plan = plan

    def train_with(self, loss: str, read_supervised: bool) -> None:
        """How the loss is computed from now on; the model starts with the plain way.

        Args:
            loss: of :data:`.loss.LOSSES`.
            read_supervised: with labels the last layer runs queries and feed-forward network only where a label is
                predicted, also under a dense plan. The loss differs by rounding alone; of other positions
                ``hidden_states`` are unfinished.
        """
        self._loss_kind, self._read_supervised = loss, read_supervised
        self.set_plan(self._plan)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.language_model.get_output_embeddings()

    def encode_images(
        self, pixel_values: Tensor, image_tiles: Tensor | Sequence[int] | None = None, queries: int | None = None
    ) -> ReducedImages:
        """Turn images into the language model's visual tokens.

        Args:
            pixel_values: (N, 3, S, S) normalised pixels, the tiles of all images one after the other.
            image_tiles: (I,) int64, or as many numbers, tiles per image; None means one each.
            queries: m of an elastic number of queries; None is ``connector.keep``.

        Returns:
            each image's tokens in the order of ``config.image_token_kinds(tiles, queries)``.
        """
        tiles = image_tiles.tolist() if isinstance(image_tiles, Tensor) else image_tiles
        features = self.vision_tower(pixel_values)
        levels = self.connector(features) if queries is None else self.connector(features, queries)
        reduced: ReducedImages = self.reducer(levels, features.saliency, tiles)
        return reduced

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_tiles: Tensor | Sequence[int] | None,
        found: int | None = None,
    ) -> Tensor:
        """Token embeddings (B, T, C) with visual tokens in the places of the placeholders, ``found`` if known."""
        embeds = self.get_input_embeddings()(input_ids)
        placeholders = input_ids == self.config.image_token_id
        found = int(placeholders.sum()) if found is None else found
        if pixel_values is None:
            if found:
                raise ValueError(f"input_ids hold {found} image placeholders but pixel_values is missing")
            if self.training:
                # Every rank must run the same modules: under ZeRO-3 a text-only rank would otherwise leave the others
                # waiting for its share of the vision weights.
                embeds = embeds + 0.0 * self._nothing(embeds)
            return embeds
        queries = self._elastic_queries(found, len(pixel_values))
        images = self.encode_images(pixel_values, image_tiles, queries)
        if found != len(images.tokens):
            raise ValueError(
                f"input_ids hold {found} image placeholders, but {len(images.lengths)} images of {len(pixel_values)} "
                f"tiles give {len(images.tokens)} visual tokens"
            )
        return embeds.masked_scatter(placeholders.unsqueeze(-1), images.tokens.to(embeds.dtype))

    def _nothing(self, embeds: Tensor) -> Tensor:
        """The sum over the tokens of a blank image, for batches without one."""
        size, tiles = self.config.vision_config.image_size, self.config.tiling_config.counts[0]
        blank = embeds.new_zeros(tiles, 3, size, size)
        return self.encode_images(blank, [tiles]).tokens.sum()

    def _elastic_queries(self, placeholders: int, tiles: int) -> int | None:
        """How many queries each tile has where a batch chooses (MQT): the placeholders say it."""
        return placeholders // tiles if isinstance(self.config.connector_config, MqtConfig) else None

    def token_kinds(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_tiles: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Derive the kind of every position (B, T) from the placeholders, for callers without a processor.

        Args:
            input_ids: (B, T) int64, whole images only.
            attention_mask: (B, T), 0 on padding; None means no padding.
            image_tiles: (I,) tiles of each image in order; None means that all have as many as an image can have.
        """
        kinds = torch.full_like(input_ids, int(TokenKind.TEXT))
        placeholders = input_ids == self.config.image_token_id
        found = int(placeholders.sum())
        if image_tiles is None:
            pattern = self.config.image_token_kinds()
            images, rest = divmod(found, len(pattern))
            if rest:
                raise ValueError(f"input_ids hold {found} placeholders; an image has {len(pattern)}")
            visual = pattern * images
        else:
            tile_counts = image_tiles.tolist() if isinstance(image_tiles, Tensor) else image_tiles
            visual = tuple(k for tiles in tile_counts for k in self.config.image_token_kinds(tiles))
            if found != len(visual):
                raise ValueError(
                    f"input_ids hold {found} placeholders; the {len(image_tiles)} images have {len(visual)}"
                )
        kinds[placeholders] = torch.tensor([int(k) for k in visual], dtype=torch.int64, device=input_ids.device)
        if attention_mask is not None:
            kinds[attention_mask == 0] = int(TokenKind.PAD)
        return kinds

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_kinds: Tensor | None,
        image_tiles: Tensor | Sequence[int] | None,
        document_ids: Tensor | None,
    ) -> TokenLayout:
        """What the caller's tensors say; on the CPU if a plan is attached, else on their device."""
        if token_kinds is None:
            token_kinds = self.token_kinds(input_ids, attention_mask, image_tiles)
        if (generated := input_ids.shape[1] - token_kinds.shape[1]) > 0:
            # generate() without a cache sends the whole sequence again; what it appended is text.
            token_kinds = F.pad(token_kinds, (0, generated), value=int(TokenKind.TEXT))
        layout = TokenLayout.from_kinds(token_kinds, document_ids)
        return layout if self._attachment is None else layout.to("cpu")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_tiles: Tensor | Sequence[int] | None = None,
        token_kinds: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        token_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> SkipVisionOutput:
        """Run the model.

        Args:
            input_ids: (B, T) int64; the image placeholder stands once per visual token.
            attention_mask: (B, T) or, while decoding, (B, past + T): 1 on real tokens, 0 on padding.
            pixel_values: (N, 3, S, S), the tiles of the images of all rows in order of appearance; None without images.
            image_tiles: (I,) int64 or as many numbers, how many tiles each image has, the global view first; None means
                one each.
            token_kinds: (B, T) int64 :class:`TokenKind`, ``PAD`` on padding; derived from ``input_ids`` if missing.
            document_ids: (B, T) int64, each document one run of columns: several samples share a row, none attends to
                another, positions restart with each, and no first label is predicted. None: a row is one document.
            position_ids: (B, T); derived if missing.
            past_key_values: the KV cache; a first call with an empty cache is the prefill.
            labels: (B, T) int64, ``-100`` where nothing is supervised; label t is predicted at t - 1.
            logits_to_keep: as in transformers: the LM head runs on the last so many positions, 0 for all.
            num_items_in_batch: supervised tokens of the whole global batch; the loss is the sum over this batch divided
                by it. None divides by this batch's own number.
            token_layout: instead of ``token_kinds`` and ``document_ids``; of a training batch with what its labels say
                (:meth:`TokenLayout.with_labels`). On the CPU, and with numbers as ``image_tiles``, no step of a forward
                pass waits for a GPU.

        Returns:
            With ``labels``: ``loss`` and ``token_losses``, no logits (the LM head runs on supervised positions only).
            Without: ``logits`` (B, kept, vocabulary).

        Raises:
            ValueError: placeholders and images do not agree, with both counts; images on a filled cache.
            PlanError: packed rows, and an attention implementation that takes no mask.
        """
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if decoding and pixel_values is not None:
            raise ValueError("pixel_values: images cannot follow on a filled KV cache; give the whole conversation")
        layout, placeholders = token_layout, None
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # nobody reads a cache in training
        if not decoding:
            # Before the images are encoded: what of the layout the CPU needs must not wait for the tower.
            if layout is None:
                layout = self._layout(input_ids, attention_mask, token_kinds, image_tiles, document_ids)
            else:
                placeholders = int((~layout.is_kind(frozenset({TokenKind.TEXT, TokenKind.PAD}))).sum())
            if labels is not None and layout.read is None:
                layout = layout.with_labels(labels.to(layout.kinds.device))
            if self._attachment is not None:
                kwargs["token_layout"] = layout if self._read_supervised else replace(layout, read=None)
            else:
                attention_mask = self._stock_mask(layout, attention_mask, input_ids.device)
                position_ids = upload(layout.position_ids, input_ids.device) if position_ids is None else position_ids
        elif position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1)[:, -input_ids.shape[1] :].clamp_min(0)
        embeds = (
            self.get_input_embeddings()(input_ids)
            if decoding
            else self._embed(input_ids, pixel_values, image_tiles, placeholders)
        )
        outputs = self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden, loss, logits, token_losses = outputs.last_hidden_state, None, None, None
        if labels is not None:
            read = None if layout is None else layout.read
            loss, token_losses = self._loss(hidden, labels, read, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.language_model.lm_head(hidden[:, kept])
        return SkipVisionOutput(
            token_losses=token_losses,
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _stock_mask(self, layout: TokenLayout, attention_mask: Tensor | None, device: torch.device) -> Tensor:
        """The attention mask of a forward without a plan: padding, or what packed documents see."""
        if layout.document_ids is None:
            return upload(layout.attention_mask, device) if attention_mask is None else attention_mask
        # Not by restarting positions: transformers sees documents in them only without a mask and a cache.
        text, dtype = self.language_model.config, self.get_input_embeddings().weight.dtype
        mask: Tensor = backend_mask(layout.to(device).visible(), text._attn_implementation, dtype)
        return mask

    def _loss(
        self, hidden: Tensor, labels: Tensor, read: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and that of every supervised position; ``read`` as in :func:`.loss.predicted_losses`."""
        total, losses = predicted_losses(self.language_model.lm_head, hidden, labels, read, self._loss_kind)
        return total / (max(1, len(losses)) if num_items_in_batch is None else num_items_in_batch), losses

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; images and kinds belong to the prefill only."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_tiles", "token_kinds"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams; the images of a row are repeated together, not one by one."""
        pixels, tiles = kwargs.pop("pixel_values", None), kwargs.pop("image_tiles", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            given = [1] * len(pixels) if tiles is None else torch.as_tensor(tiles).tolist()
            images = self._images_per_row(input_ids, given)
            cuts = [sum(row) for row in images]
            pixels = torch.cat([rows.repeat(expand_size, 1, 1, 1) for rows in pixels.split(cuts)])
            tiles = None if tiles is None else torch.tensor([t for row in images for t in row * expand_size])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        repeated = {"pixel_values": pixels, "image_tiles": tiles}
        return input_ids, kwargs | {name: value for name, value in repeated.items() if value is not None}

    def _images_per_row(self, input_ids: Tensor, tiles: list[int]) -> list[list[int]]:
        """The tiles of every row's images: images fill the rows' placeholders one after the other."""
        counts = (input_ids == self.config.image_token_id).sum(-1).tolist()
        elastic = isinstance(self.config.connector_config, MqtConfig)
        rows: list[list[int]] = []
        remaining = iter(tiles)
        for left in counts:
            rows.append([])
            while left > 0 and (image := next(remaining, None)) is not None:
                rows[-1].append(image)
                left -= image * (sum(counts) // sum(tiles)) if elastic else len(self.config.image_token_kinds(image))
        return rows


AutoModel.register(SkipVisionConfig, SkipVisionForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(SkipVisionConfig, SkipVisionForConditionalGeneration, exist_ok=True)
