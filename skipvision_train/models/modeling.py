"""The Skip-Vision model: CLIP, multi-scale resampler, reducer, and a LLaMA of transformers run under a skip plan."""

from __future__ import annotations

from dataclasses import replace
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
from skipvision_train.models.connectors import MultiScaleResampler
from skipvision_train.models.reducer import Reducer
from skipvision_train.models.vision import ClipVisionTower
from skipvision_train.plans.executor import Attachment, attach
from skipvision_train.plans.layout import IGNORE_INDEX, TokenLayout, answer_starts
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind


class SkipVisionForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model whose language model runs under a :class:`SkipPlan`.

    Args:
        config: every dimension, and the plan the model starts under (``config.skip_plan``).
        language_model: a causal LM to take over instead of building a random one (saves holding the weights twice).

    Shapes: B rows, T positions, I images of all rows together, n visual tokens per image, C language model width.
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
        self.vision_tower = ClipVisionTower(vision)
        self.connector = MultiScaleResampler(
            config.connector_config, vision.grid, vision.width, len(vision.depths), width
        )
        self.reducer = Reducer(config.reducer_config, width)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self._attachment: Attachment | None = None
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
        if not plan.is_dense:
            self._attachment = attach(self.language_model, plan)
        self._plan = plan

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn images into the language model's visual tokens.

        Args:
            pixel_values: (I, 3, S, S) normalised pixels.

        Returns:
            (I, n, C), in the order of ``config.image_token_kinds()``.
        """
        return self.reducer(self.connector(self.vision_tower(pixel_values)))

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings (B, T, C) with visual tokens in the placeholders' places."""
        embeds = self.get_input_embeddings()(input_ids)
        placeholders = input_ids == self.config.image_token_id
        if pixel_values is None:
            found = int(placeholders.sum())
            if found:
                raise ValueError(f"input_ids hold {found} image placeholders but pixel_values is missing")
            if self.training:
                # Every rank must run the same modules: under ZeRO-3 a text-only rank would otherwise leave the others
                # waiting for its share of the vision weights.
                size = self.config.vision_config.image_size
                embeds = embeds + 0.0 * self.encode_images(embeds.new_zeros(1, 3, size, size)).sum()
            return embeds
        features = self.encode_images(pixel_values).to(embeds.dtype)
        found, expected = int(placeholders.sum()), features.shape[0] * features.shape[1]
        if found != expected:
            raise ValueError(
                f"input_ids hold {found} image placeholders, but {features.shape[0]} images give "
                f"{features.shape[0]} x {features.shape[1]} = {expected} visual tokens"
            )
        return embeds.masked_scatter(placeholders.unsqueeze(-1), features)

    def token_kinds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Derive the kind of every position (B, T) from the placeholders, for callers without a processor.

        Args:
            input_ids: (B, T) int64, whole images only.
            attention_mask: (B, T), 0 on padding; None means no padding.
        """
        kinds = torch.full_like(input_ids, int(TokenKind.TEXT))
        placeholders = input_ids == self.config.image_token_id
        pattern = torch.tensor([int(k) for k in self.config.image_token_kinds()], device=input_ids.device)
        images, rest = divmod(int(placeholders.sum()), len(pattern))
        if rest:
            raise ValueError(f"input_ids hold {images * len(pattern) + rest} placeholders; an image has {len(pattern)}")
        kinds[placeholders] = pattern.repeat(images)
        if attention_mask is not None:
            kinds[attention_mask == 0] = int(TokenKind.PAD)
        return kinds

    def _layout(self, input_ids: Tensor, attention_mask: Tensor | None, token_kinds: Tensor | None) -> TokenLayout:
        if token_kinds is None:
            token_kinds = self.token_kinds(input_ids, attention_mask)
        if (generated := input_ids.shape[1] - token_kinds.shape[1]) > 0:
            # generate() without a cache sends the whole sequence again; what it appended is text.
            token_kinds = F.pad(token_kinds, (0, generated), value=int(TokenKind.TEXT))
        return TokenLayout.from_kinds(token_kinds)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        token_kinds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: (B, T) int64; the image placeholder stands once per visual token.
            attention_mask: (B, T) or, while decoding, (B, past + T): 1 on real tokens, 0 on padding.
            pixel_values: (I, 3, S, S), the images of all rows in order of appearance; None without images.
            token_kinds: (B, T) int64 :class:`TokenKind`; derived from ``input_ids`` if missing.
            position_ids: (B, T); derived if missing.
            past_key_values: the KV cache; a first call with an empty cache is the prefill.
            labels: (B, T) int64, ``-100`` where nothing is supervised; label t is predicted at t - 1.
            logits_to_keep: as in transformers: the LM head runs on the last so many positions, 0 for all.
            num_items_in_batch: supervised tokens of the whole global batch; the loss is the sum over this batch divided
                by it. None divides by this batch's own number.

        Returns:
            With ``labels``: ``loss``, and no logits (the LM head runs on supervised positions only).
            Without: ``logits`` (B, kept, vocabulary).

        Raises:
            ValueError: placeholders and images do not agree, with both counts.
        """
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        embeds = self.get_input_embeddings()(input_ids) if decoding else self._embed(input_ids, pixel_values)
        if not decoding:
            layout = self._layout(input_ids, attention_mask, token_kinds)
            attention_mask = layout.attention_mask if attention_mask is None else attention_mask
            position_ids = layout.position_ids if position_ids is None else position_ids
            if self._attachment is not None:
                if labels is not None and self._plan.drops:
                    # In training what is dropped is ranked where an answer begins, not by the answer's last token.
                    layout = replace(layout, asking=answer_starts(labels))
                kwargs["token_layout"] = layout
        elif position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1)[:, -input_ids.shape[1] :].clamp_min(0)
        outputs = self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = self._loss(hidden, labels, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.language_model.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Cross entropy in fp32 over supervised positions; the LM head sees no other position."""
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.language_model.lm_head(hidden[:, :-1][supervised]).float()
        total = F.cross_entropy(logits, targets[supervised], reduction="sum")
        if num_items_in_batch is None:
            return total / supervised.sum().clamp_min(1)
        return total / num_items_in_batch

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; images and kinds belong to the prefill only."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("token_kinds", None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams; the images of a row are repeated together, not one by one."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            per_image = len(self.config.image_token_kinds())
            counts = ((input_ids == self.config.image_token_id).sum(-1) // per_image).tolist()
            pixels = torch.cat([rows.repeat(expand_size, 1, 1, 1) for rows in pixels.split(counts)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None:
            kwargs["pixel_values"] = pixels
        return input_ids, kwargs


AutoModel.register(SkipVisionConfig, SkipVisionForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(SkipVisionConfig, SkipVisionForConditionalGeneration, exist_ok=True)
