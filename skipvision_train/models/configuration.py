"""The model's configuration: what ``config.json`` holds, and the counts that follow from it.

Every dimension is stated once. Grid sizes, token counts and the order of an image's tokens are derived here, so that
the processor knows an image's token kinds before any model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.llama import LlamaConfig

from skipvision_train.errors import ConfigError
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer, and which of its hidden states the connector reads.

    Attributes:
        image_size: pixels per side of the square input; a multiple of ``patch_size``.
        patch_size: pixels per side of a patch.
        width: channels of the transformer.
        layers: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over ``width``.
        quick_gelu: OpenAI's activation ``x * sigmoid(1.702 x)``; with OpenAI weights and plain GELU the features are
            silently wrong.
        depths: hidden states handed to the connector; 0 is the embedding output, i the output of block i (1-based).
        image_mean: per channel, of pixel values in [0, 1].
        image_std: per channel, of pixel values in [0, 1].
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    depths: tuple[int, ...] = (15, 22)
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD

    def __post_init__(self) -> None:
        for name in ("depths", "image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size: {self.image_size} is no multiple of vision.patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"vision.width: {self.width} is no multiple of vision.heads {self.heads}")
        if not self.depths or any(not 0 <= d <= self.layers for d in self.depths):
            raise ConfigError(f"vision.depths: {list(self.depths)} must name hidden states from 0 to {self.layers}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ConnectorConfig:
    """The multi-scale resampler (Chain-of-Sight): one level per window size, coarsest first.

    Attributes:
        windows: window side of each level, in patches, strictly decreasing; each divides the grid.
        queries: learned queries of each level over the whole image; a multiple of the level's number of windows.
        head_dim: channels per attention head.
        init_std: standard deviation of the weights a fresh resampler starts from. 0.02 suits CLIP's 1,024 channels; a
            narrow tower wants more (0.02 times the root of 1,024 over its width), or the signal starts too small.
    """

    windows: tuple[int, ...] = (32, 4, 2)
    queries: tuple[int, ...] = (16, 256, 1024)
    head_dim: int = 64
    init_std: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "queries", tuple(self.queries))
        if not self.windows or len(self.windows) != len(self.queries):
            raise ConfigError(
                f"connector.queries: {len(self.queries)} levels, but connector.windows has {len(self.windows)}"
            )
        if list(self.windows) != sorted(set(self.windows), reverse=True):
            raise ConfigError(f"connector.windows: {list(self.windows)} must be strictly decreasing")

    def check_grid(self, grid: int) -> None:
        """Refuse a patch grid that the windows do not tile.

        Raises:
            ConfigError: naming the level, the window and the grid.
        """
        for level, (window, queries) in enumerate(zip(self.windows, self.queries, strict=True)):
            if window < 1 or grid % window:
                raise ConfigError(
                    f"connector.windows[{level}]: {window} does not divide the {grid} x {grid} grid of patches; "
                    f"use one of {[w for w in range(1, grid + 1) if grid % w == 0]}"
                )
            count = (grid // window) ** 2
            if queries < 1 or queries % count:
                raise ConfigError(
                    f"connector.queries[{level}]: {queries} is no multiple of the level's {count} windows"
                )

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one image, all levels together."""
        return sum(self.queries)


@dataclass(frozen=True)
class ReducerConfig:
    """What happens to the finest level's tokens between the resampler and the language model.

    Attributes:
        skip_finest: the finest level's tokens become ``SKIPPED``; with False every token is ``RETAINED`` (the dense
            baseline) and the fields below must stay at their off values.
        local_keep: merge the finest level's tokens down to this many (Skip-Vision, Sec. 4.1); None merges nothing.
        summary: ``both``, ``former``, ``latter`` or ``none``: the adaptive summary tokens (Eq. 6) before and after the
            skipped tokens.
        former_over: what the former summary token summarises: ``middle`` (the second finest level, as the released
            code does) or ``retained`` (every retained token, as the paper says).
        last_local_ffn: the last skipped token runs the FFN and stays in the cache: it is laid out as ``RETAINED``.
        registers: so many learned tokens stand behind every image, for Victor. They are trained with the model; another
            number needs training anew. They may stand behind the dense arrangement too.
    """

    skip_finest: bool = True
    local_keep: int | None = 256
    summary: str = "both"
    former_over: str = "middle"
    last_local_ffn: bool = True
    registers: int = 0

    def __post_init__(self) -> None:
        if self.summary not in ("both", "former", "latter", "none"):
            raise ConfigError(f"reducer.summary: {self.summary!r} is unknown; use both, former, latter or none")
        if self.former_over not in ("middle", "retained"):
            raise ConfigError(f"reducer.former_over: {self.former_over!r} is unknown; use middle or retained")
        if not self.skip_finest and (self.local_keep is not None or self.summary != "none" or self.last_local_ffn):
            raise ConfigError(
                "reducer.skip_finest: false leaves no skipped tokens, so local_keep must be null, summary none and "
                "last_local_ffn false"
            )
        if self.registers < 0:
            raise ConfigError(f"reducer.registers: {self.registers} is out of range; use 0 or more")

    @classmethod
    def off(cls) -> ReducerConfig:
        """The dense arrangement: no skipping, no merging, no summary tokens, no registers."""
        return cls(skip_finest=False, local_keep=None, summary="none", last_local_ffn=False)

    @property
    def has_former(self) -> bool:
        """True if a summary token stands before the skipped tokens."""
        return self.summary in ("both", "former")

    @property
    def has_latter(self) -> bool:
        """True if a summary token stands after the skipped tokens."""
        return self.summary in ("both", "latter")


T = TypeVar("T")


def _build(kind: type[T], values: Mapping[str, Any] | T, where: str) -> T:
    """Make a config dataclass of a mapping; unknown keys are an error that names them."""
    if isinstance(values, kind):
        return values
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):  # type: ignore[arg-type]
        raise ConfigError(f"{where}: unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**values)  # type: ignore[arg-type]


class SkipVisionConfig(PreTrainedConfig):
    """Everything that ``config.json`` of a Skip-Vision model holds.

    Args:
        text_config: the language model's configuration (LLaMA architecture), a config object or its dict.
        vision: :class:`VisionConfig` or its dict.
        connector: :class:`ConnectorConfig` or its dict.
        reducer: :class:`ReducerConfig` or its dict.
        image_token_id: the placeholder that the processor repeats once per visual token.
        skip_plan: the plan the model is trained with and runs under by default, as :meth:`SkipPlan.to_dict`; None is
            dense.

    Raises:
        ConfigError: windows that do not tile the grid, more kept tokens than there are, a plan that needs more
            registers than ``reducer`` has.
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
        image_token_id: int = 128002,
        skip_plan: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        text = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.text_config: PreTrainedConfig = text
        self.vision = asdict(_build(VisionConfig, vision or {}, "vision"))
        self.connector = asdict(_build(ConnectorConfig, connector or {}, "connector"))
        self.reducer = asdict(_build(ReducerConfig, reducer or {}, "reducer"))
        self.image_token_id = image_token_id
        self.skip_plan = skip_plan
        self._check()
        kwargs.setdefault("tie_word_embeddings", text.tie_word_embeddings)
        super().__init__(**kwargs)

    def _check(self) -> None:
        connector, reducer = self.connector_config, self.reducer_config
        connector.check_grid(self.vision_config.grid)
        local = connector.queries[-1]
        if reducer.skip_finest and len(connector.queries) < 2:
            raise ConfigError("reducer.skip_finest: needs at least two levels in connector.windows; the finest skips")
        if reducer.local_keep is not None and not 1 <= reducer.local_keep <= local:
            raise ConfigError(f"reducer.local_keep: {reducer.local_keep} of {local} tokens; use 1 to {local}")
        if self.skip_plan is not None:
            self.plan_or_dense()

    @property
    def vision_config(self) -> VisionConfig:
        """The vision part, typed."""
        return VisionConfig(**self.vision)

    @property
    def connector_config(self) -> ConnectorConfig:
        """The resampler part, typed."""
        return ConnectorConfig(**self.connector)

    @property
    def reducer_config(self) -> ReducerConfig:
        """The reducer part, typed."""
        return ReducerConfig(**self.reducer)

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

    def image_token_kinds(self) -> tuple[TokenKind, ...]:
        """The kinds of one image's tokens in the order in which the language model sees them.

        ``retained | middle | former | skipped | last local | latter | registers`` (Skip-Vision, Fig. 4), levels
        coarsest first; ``MIDDLE`` are the levels between the coarsest and the finest. The dense arrangement has
        ``RETAINED`` tokens only: with its levels told apart but nothing skipped, ``skip_kv("middle + small")`` would
        evict the middle ones and keep the small ones.
        """
        connector, reducer = self.connector_config, self.reducer_config
        registers = (TokenKind.SUMMARY,) * reducer.registers
        if not reducer.skip_finest:
            return (TokenKind.RETAINED,) * connector.num_tokens + registers
        local = connector.queries[-1] if reducer.local_keep is None else reducer.local_keep
        last = 1 if reducer.last_local_ffn else 0
        kinds = [TokenKind.RETAINED] * connector.queries[0] + [TokenKind.MIDDLE] * sum(connector.queries[1:-1])
        kinds += [TokenKind.SUMMARY] * reducer.has_former
        kinds += [TokenKind.SKIPPED] * (local - last) + [TokenKind.RETAINED] * last
        kinds += [TokenKind.SUMMARY] * reducer.has_latter
        return (*kinds, *registers)


AutoConfig.register("skipvision", SkipVisionConfig, exist_ok=True)
