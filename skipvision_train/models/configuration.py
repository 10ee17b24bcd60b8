"""The model's configuration: what ``config.json`` holds, and the layout of an image's tokens that follows from it.

The parts' settings are in ``settings.py`` and ``connector_settings.py``. What depends on several parts is checked here,
so that the processor knows an image's token kinds before any model is built.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.llama import LlamaConfig

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import (
    ConnectorConfig,
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    VisionZipConfig,
    build_connector_config,
    connector_dict,
)
from skipvision_train.models.settings import ReducerConfig, TilingConfig, VisionConfig, build
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind


class SkipVisionConfig(PreTrainedConfig):
    """Everything that ``config.json`` of a Skip-Vision model holds.

    Args:
        text_config: the language model's configuration (LLaMA architecture), a config object or its dict.
        vision: :class:`VisionConfig` or its dict.
        connector: one of :data:`CONNECTORS`' settings or its dict with ``type``.
        reducer: :class:`ReducerConfig` or its dict.
        tiling: :class:`TilingConfig` or its dict.
        image_token_id: the placeholder that the processor repeats once per visual token.
        skip_plan: the plan the model is trained with and runs under by default, as :meth:`SkipPlan.to_dict`; None is
            dense.

    Raises:
        ConfigError: a connector that does not fit the grid of patches, a split that the connector or the tiling does
            not allow, more retained or kept tokens than there are, a plan that needs more registers than there are.
        PlanError: a plan that is malformed or of another depth.
    """

    model_type = "skipvision"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it off the class)

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision: VisionConfig | dict[str, Any] | None = None,
        connector: ConnectorConfig | dict[str, Any] | None = None,
        reducer: ReducerConfig | dict[str, Any] | None = None,
        tiling: TilingConfig | dict[str, Any] | None = None,
        image_token_id: int = 128002,
        skip_plan: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        text = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.text_config: PreTrainedConfig = text
        self.vision = asdict(build(VisionConfig, vision or {}, "vision"))
        self.tiling = asdict(build(TilingConfig, tiling or {}, "tiling"))
        self.connector = connector_dict(build_connector_config(connector or {}))
        self.reducer = asdict(build(ReducerConfig, reducer or {}, "reducer"))
        self.image_token_id = image_token_id
        self.skip_plan = skip_plan
        self._check()
        kwargs.setdefault("tie_word_embeddings", text.tie_word_embeddings)
        super().__init__(**kwargs)

    def _check(self) -> None:
        levels, reducer, tiling = self.tile_levels(), self.reducer_config, self.tiling_config
        if reducer.split == "finest" and len(levels) < 2:
            raise ConfigError("reducer.split: finest needs at least two levels in connector.windows; the finest skips")
        if reducer.split == "tiles" and tiling.mode == "none":
            raise ConfigError("reducer.split: tiles needs tiling.mode aspect or square; with none there is one tile")
        if reducer.split in ("finest", "saliency") and tiling.mode != "none":
            raise ConfigError(f"tiling.mode: {tiling.mode} with reducer.split {reducer.split}; use split tiles or none")
        if reducer.split == "saliency":
            self._check_saliency()
        connector = self.connector_config
        if isinstance(connector, MqtConfig) and (reducer.split != "none" or reducer.registers):
            raise ConfigError(
                "connector.type: mqt needs reducer.split none and reducer.registers 0; its tokens vary in number"
            )
        local = self._split(max(tiling.counts))[1]
        # An image with fewer local tokens than local_keep keeps them all, but no image may have a use for more.
        if reducer.local_keep is not None and reducer.local_keep > local:
            raise ConfigError(f"reducer.local_keep: {reducer.local_keep} of {local} tokens; use 1 to {local}")
        former, latter = reducer.has_former, reducer.has_latter
        for name, over in (
            ("former_over", reducer.former_over * former),
            ("latter_over", reducer.latter_over * latter),
        ):
            if over == "middle" and reducer.split != "finest":
                raise ConfigError(
                    f"reducer.{name}: middle is a level of the resampler, which reducer.split {reducer.split} does not "
                    "tell apart; use retained or skipped"
                )
        if self.skip_plan is not None:
            self.plan_or_dense()

    def _check_saliency(self) -> None:
        connector, patches = self.connector_config, self.vision_config.grid**2
        if not isinstance(connector, MlpConfig) or connector.pool != 1:
            raise ConfigError(
                "reducer.split: saliency ranks the patches, which this connector does not keep; use connector.type mlp "
                "without pooling"
            )
        retain = self.reducer_config.retain or 0
        if not 1 <= retain < patches:
            raise ConfigError(f"reducer.retain: {retain} of {patches} tokens; use 1 to {patches - 1}")

    @property
    def vision_config(self) -> VisionConfig:
        """The vision part, typed."""
        return VisionConfig(**self.vision)

    @property
    def tiling_config(self) -> TilingConfig:
        """The tiling, typed."""
        return TilingConfig(**self.tiling)

    @property
    def connector_config(self) -> ConnectorConfig:
        """The connector part, typed."""
        return build_connector_config(self.connector)

    @property
    def reducer_config(self) -> ReducerConfig:
        """The reducer part, typed."""
        return ReducerConfig(**self.reducer)

    @property
    def readout(self) -> str:
        """What the vision tower reads off its class token: ``none``, ``attention`` or ``similarity``."""
        if isinstance(self.connector_config, VisionZipConfig):
            return "attention"
        reducer = self.reducer_config
        return reducer.retain_by if reducer.split == "saliency" else "none"

    def tile_levels(self) -> tuple[int, ...]:
        """Tokens that the connector makes of one tile, per level, coarsest first."""
        return self.connector_config.levels(self.vision_config)

    def plan_or_dense(self) -> SkipPlan:
        """The stored plan, or the dense plan of the model's depth.

        Raises:
            PlanError: the stored plan is malformed or written for another depth.
            ConfigError: it needs more registers than the model has.
        """
        return self.fit_plan(dense() if self.skip_plan is None else SkipPlan.from_dict(self.skip_plan, "skip_plan"))

    def fit_plan(self, plan: SkipPlan) -> SkipPlan:
        """The plan bound to the model's depth.

        Raises:
            PlanError: the plan is written for another depth.
            ConfigError: the plan needs more registers than stand behind an image; both numbers are named.
        """
        registers = self.reducer_config.registers
        if plan.registers > registers:
            raise ConfigError(
                f"reducer.registers: {registers}, but plan {plan.name!r} needs {plan.registers}; registers must be "
                f"trained with the model: train one with reducer.registers={plan.registers}, or use a plan without them"
            )
        return plan.bind(self.text_config.num_hidden_layers)

    def _split(self, tiles: int) -> tuple[int, int]:
        """Tokens of an image of so many tiles before merging: all but the local ones, and the local ones."""
        reducer, levels = self.reducer_config, self.tile_levels()
        tile = sum(levels)
        local = {
            "none": 0,
            "finest": levels[-1],
            "saliency": tile - (reducer.retain or 0),
            "tiles": (tiles - 1) * tile,
        }[reducer.split]
        return tiles * tile - local, local

    def local_tokens(self, tiles: int) -> int:
        """Local tokens of an image of so many tiles before merging."""
        return self._split(tiles)[1]

    def baseline_tokens(self, tiles: int = 1) -> int:
        """Visual tokens of an image of so many tiles in the dense baseline of its setting.

        All tokens of the resampler (CoS), or all patches (LLaVA, LLaVA-HD), which the other connectors reduce.
        """
        resampler = isinstance(self.connector_config, ResamplerConfig)
        return tiles * (sum(self.tile_levels()) if resampler else self.vision_config.grid**2)

    def image_token_kinds(self, tiles: int | None = None, queries: int | None = None) -> tuple[TokenKind, ...]:
        """The kinds of one image's tokens in the order in which the language model sees them.

        ``retained | middle | former | skipped | last local | latter | registers`` (Skip-Vision, Fig. 4), levels
        coarsest first; ``MIDDLE`` are the levels between the coarsest and the finest, where the finest skips. The dense
        arrangement has ``RETAINED`` tokens only: with its levels told apart but nothing skipped,
        ``skip_kv("middle + small")`` would evict the middle ones and keep the small ones.

        Args:
            tiles: of the image, one of ``tiling_config.counts``; None is the largest.
            queries: m of an elastic number of queries; None is ``connector.keep``.

        Raises:
            ConfigError: a number of tiles or queries that this configuration does not have.
        """
        counts = self.tiling_config.counts
        tiles = counts[-1] if tiles is None else tiles
        if tiles not in counts:
            raise ConfigError(f"tiles: {tiles}; an image has {' or '.join(map(str, counts))}")
        reducer, levels = self.reducer_config, self.tile_levels()
        registers = (TokenKind.SUMMARY,) * reducer.registers
        if reducer.split == "none":
            number = tiles * sum(levels) if queries is None else tiles * self._elastic(queries)
            return (TokenKind.RETAINED,) * number + registers
        retained, local = self._split(tiles)
        kinds = [TokenKind.RETAINED] * retained
        if reducer.split == "finest":
            kinds[levels[0] :] = [TokenKind.MIDDLE] * (retained - levels[0])
        merged, last = reducer.merged(local), 1 if reducer.last_local_ffn else 0
        kinds += [TokenKind.SUMMARY] * reducer.has_former
        kinds += [TokenKind.SKIPPED] * (merged - last) + [TokenKind.RETAINED] * last
        kinds += [TokenKind.SUMMARY] * reducer.has_latter
        return (*kinds, *registers)

    def _elastic(self, queries: int) -> int:
        connector = self.connector_config
        if not isinstance(connector, MqtConfig):
            raise ConfigError(
                f"queries: {queries}; connector.type {self.connector['type']} has a fixed number of tokens"
            )
        if not 1 <= queries <= connector.queries:
            raise ConfigError(f"queries: {queries} of {connector.queries}; use 1 to {connector.queries}")
        return queries


AutoConfig.register("skipvision", SkipVisionConfig, exist_ok=True)
