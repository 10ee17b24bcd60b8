"""Reading a connector's weights: LLaVA's projector in all its files, published connectors, an own model directory.

In published files a projector is told by a part of its tensors' names (``mm_projector.``, ``query_abstractor.``,
``multi_modal_projector.``), whatever stands before it: ``model.`` in LLaVA's ``mm_projector.bin`` and directories,
``base_model.model.model.`` in ``non_lora_trainables.bin``. Each layout below says which of those tensors becomes which
parameter. The names are facts of public code: haotian-liu/LLaVA, transformers' ``LlavaForConditionalGeneration``,
gordonhu608/MQT-LLaVA, CircleRadon/TokenPacker, and zwl666666/Skip-Vision for Chain-of-Sight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import (
    ConnectorConfig,
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.loading import LoadReport
from skipvision_train.models.scaling import scale_resampler
from skipvision_train.models.settings import VisionConfig
from skipvision_train.models.weights import DIRECTORY_FILES, WeightFiles, read_json

OWN_PREFIX = "connector."
PROJECTOR_FILES = (*DIRECTORY_FILES, "mm_projector.bin", "query_abstractor.bin", "non_lora_trainables.bin")
"""Where a directory keeps a projector. Whole models come first: theirs was trained on after ``mm_projector.bin``."""


@dataclass(frozen=True)
class Layout:
    """How published tensors become a connector's parameters.

    Attributes:
        marker: what the tensors' names hold, with everything after it being the name below.
        names: published name -> parameters, which share the tensor's rows equally.
        transposed: published names of matrices that are applied from the other side.
        batched: published names of parameters with a batch dimension of one.
        ignored: published names that hold nothing learned.
    """

    marker: str
    names: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = field(default=frozenset())
    batched: frozenset[str] = field(default=frozenset())
    ignored: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True)
class ProjectorCheckpoint:
    """A connector's weights in memory.

    Attributes:
        source: the file or directory, for messages.
        state: tensors under the connector's own names, dtype as stored.
        origins: for every one, the name it is stored under.
        unused: names of the checkpoint's other tensors.
    """

    source: Path
    state: Mapping[str, Tensor] = field(repr=False)
    origins: Mapping[str, str] = field(repr=False)
    unused: tuple[str, ...] = field(default=(), repr=False)


def read_projector(path: Path, config: SkipVisionConfig, contents: bool = True) -> ProjectorCheckpoint:
    """Read the weights of ``config``'s connector.

    * a model directory of this package: a connector of the same kind, a resampler is scaled to ``config``'s;
    * LLaVA's ``mm_projector.bin`` (also of one linear layer) or ``non_lora_trainables.bin``, a LLaVA model directory
      of the original code or of transformers: for connectors ``mlp`` and ``visionzip``;
    * the same files of MQT-LLaVA, TokenPacker and Chain-of-Sight, for their connectors; Chain-of-Sight's is scaled.

    Args:
        path: the file or directory.
        config: of the model that the connector is for.
        contents: false reads configurations and headers alone; the tensors are on "meta" then.

    Raises:
        ConfigError: an own directory with another connector.
        CheckpointError: nothing there that can be read, or a projector of another shape or kind.
    """
    path = Path(path)
    described = path / "config.json"
    if described.is_file():
        content = read_json(described)
        if content.get("model_type") == SkipVisionConfig.model_type:
            return read_own(WeightFiles.open(path, contents=contents), SkipVisionConfig.from_pretrained(path), config)
        if (activation := content.get("projector_hidden_act", "gelu")) != "gelu":
            raise CheckpointError(f"{described}: projector_hidden_act {activation!r}; connector.type mlp computes gelu")
    return _read_published(WeightFiles.open(path, PROJECTOR_FILES, contents), config)


def read_own(weights: WeightFiles, old: SkipVisionConfig, new: SkipVisionConfig) -> ProjectorCheckpoint:
    """The connector of a model of this package, brought to the shape of ``new``'s.

    Raises:
        ConfigError: the connectors are of different kinds, or a resampler cannot be scaled.
        CheckpointError: tensors are missing.
    """
    check_connectors(weights.source, old, new)
    before, after = old.connector_config, new.connector_config
    names = [name for name in weights.tensors if name.startswith(OWN_PREFIX)]
    state = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in weights.read(names).items()}
    origins = {name: OWN_PREFIX + name for name in state}
    if isinstance(before, ResamplerConfig) and isinstance(after, ResamplerConfig):
        state = scale_resampler(state, before, old.vision_config.grid, after, new.vision_config.grid)
        origins = {name: OWN_PREFIX + name for name in state}
    return ProjectorCheckpoint(weights.source, state, origins)


def check_connectors(source: Path, old: SkipVisionConfig, new: SkipVisionConfig) -> None:
    """Refuse to take a connector's weights over into one that would compute something else with them.

    ``mlp`` and ``visionzip`` are one kind: VisionZip has no weights but LLaVA's projector.

    Raises:
        ConfigError: other types, both are named; or another number of attention heads, which no shape tells.
    """
    before, after = old.connector_config, new.connector_config
    llava = (MlpConfig, VisionZipConfig)
    if type(before) is not type(after) and not (isinstance(before, llava) and isinstance(after, llava)):
        raise ConfigError(
            f"connector.type: {new.connector['type']}, but {source} was trained with {old.connector['type']}; "
            "keep its type, or start anew"
        )
    for name, (had, wants) in _heads(before, after).items():
        if had != wants:
            raise ConfigError(f"connector.{name}: {wants}, but {source} was trained with {had}")


def _heads(before: ConnectorConfig, after: ConnectorConfig) -> dict[str, tuple[int, int]]:
    if isinstance(before, MqtConfig) and isinstance(after, MqtConfig):
        return {"head_dim": (before.head_dim, after.head_dim)}
    if isinstance(before, TokenPackerConfig) and isinstance(after, TokenPackerConfig):
        return {"heads": (before.heads, after.heads)}
    return {}


def load_projector(connector: nn.Module, checkpoint: ProjectorCheckpoint) -> LoadReport:
    """Copy a connector's weights; every parameter is set or nothing is.

    Raises:
        CheckpointError: a tensor is missing, has no place, or is of another shape, which is named with both.
    """
    own = connector.state_dict()
    if missing := [name for name in own if name not in checkpoint.state]:
        raise CheckpointError(
            f"{checkpoint.source}: the connector lacks {len(missing)} tensors, first {missing[0]} of shape "
            f"{tuple(own[missing[0]].shape)}"
        )
    if unknown := [name for name in checkpoint.state if name not in own]:
        raise CheckpointError(
            f"{checkpoint.source}: holds {len(unknown)} tensors that the connector has no place for, first "
            f"{checkpoint.origins[unknown[0]]}"
        )
    for name, tensor in own.items():
        if (found := tuple(checkpoint.state[name].shape)) != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.source}: {checkpoint.origins[name]} gives {name} the shape {found}, the connector needs "
                f"{tuple(tensor.shape)}"
            )
    connector.load_state_dict(checkpoint.state)
    return LoadReport(unused=checkpoint.unused)


def _read_published(weights: WeightFiles, config: SkipVisionConfig) -> ProjectorCheckpoint:
    connector, vision = config.connector_config, config.vision_config
    stored = _projector_names(weights.source, weights.tensors, _markers(connector))
    trained = _trained_resampler(weights.source, connector, stored) if isinstance(connector, ResamplerConfig) else None
    layout = _layout(trained or connector, vision, stored)
    if unknown := [name for name in stored if name not in layout.names and name not in layout.ignored]:
        raise CheckpointError(
            f"{weights.source}: {stored[unknown[0]]} has no place in connector.type {config.connector['type']}; is "
            "this another projector, or one of more layers?"
        )
    if missing := [name for name in layout.names if name not in stored]:
        raise CheckpointError(
            f"{weights.source}: the projector lacks {len(missing)} tensors, first {layout.marker}{missing[0]}"
        )
    state, origins = _rename(weights, layout, stored)
    if isinstance(connector, ResamplerConfig) and trained is not None:
        state = scale_resampler(state, trained, trained.windows[0], connector, vision.grid)
        origins = {name: origins.get(name, name) for name in state}
    used = {stored[name] for name in layout.names}
    return ProjectorCheckpoint(weights.source, state, origins, tuple(n for n in weights.tensors if n not in used))


def _markers(connector: ConnectorConfig) -> tuple[str, ...]:
    if isinstance(connector, MqtConfig):
        return ("query_abstractor.",)
    if isinstance(connector, MlpConfig | VisionZipConfig):
        return ("mm_projector.", "multi_modal_projector.")
    return ("mm_projector.",)


def _projector_names(source: Path, names: Iterable[str], markers: tuple[str, ...]) -> dict[str, str]:
    """What follows the marker -> the whole name, of the projector's tensors."""
    stored: dict[str, str] = {}
    for name in names:
        for marker in markers:
            if name.startswith(marker) or f".{marker}" in name:
                short = name.rpartition(marker)[2]
                if short in stored:
                    raise CheckpointError(f"{source}: {stored[short]} and {name} are two tensors for one place")
                stored[short] = name
    if not stored:
        raise CheckpointError(f"{source}: holds no projector; no tensor's name has {' or '.join(markers)}")
    return stored


def _rename(
    weights: WeightFiles, layout: Layout, stored: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the connector's names, and where each comes from."""
    tensors = weights.read(stored[name] for name in layout.names)
    state: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for published, names in layout.names.items():
        tensor = tensors[stored[published]]
        if published in layout.transposed:
            tensor = tensor.t()
        if published in layout.batched:
            tensor = tensor.flatten(0, 1)
        if not tensor.dim() or len(tensor) % len(names):
            raise CheckpointError(
                f"{weights.source}: {stored[published]} has shape {tuple(tensor.shape)}, which is not the {len(names)} "
                "matrices in one that it should be"
            )
        state.update(zip(names, tensor.chunk(len(names)), strict=True))
        origins.update(dict.fromkeys(names, stored[published]))
    return state, origins


def _layout(connector: ConnectorConfig, vision: VisionConfig, stored: Iterable[str]) -> Layout:
    if isinstance(connector, MlpConfig | VisionZipConfig):
        return _llava_layout(connector.layers, set(stored))
    if isinstance(connector, MqtConfig):
        return _mqt_layout()
    if isinstance(connector, TokenPackerConfig):
        return _token_packer_layout()
    return _cos_layout(connector, vision.depths)


def _modules(pairs: Mapping[str, str], ends: tuple[str, ...] = (".weight", ".bias")) -> dict[str, tuple[str, ...]]:
    return {theirs + end: (ours + end,) for theirs, ours in pairs.items() for end in ends}


def _llava_layout(layers: int, stored: set[str]) -> Layout:
    if "linear_1.weight" in stored:  # transformers numbers the layers
        names = _modules({f"linear_{layer + 1}": str(2 * layer) for layer in range(layers)})
        return Layout("multi_modal_projector.", names)
    if "weight" in stored:  # mm_projector_type linear: the layer itself
        return Layout("mm_projector.", {"weight": ("0.weight",), "bias": ("0.bias",)})
    return Layout("mm_projector.", _modules({str(2 * layer): str(2 * layer) for layer in range(layers)}))


def _mqt_layout() -> Layout:
    fused = {f"attn.in_proj_{end}": tuple(f"{part}.{end}" for part in ("query", "key", "value")) for end in _ENDS}
    names = _modules({"attn.out_proj": "out", "ln_q": "norm_query", "ln_k": "norm_key", "ln_v": "norm_value"})
    return Layout(
        "query_abstractor.",
        {"query": ("queries",), **fused, **names, "proj": ("projection.weight",)},
        transposed=frozenset({"proj"}),
        ignored=frozenset({"pos_embed"}),  # sines and cosines
    )


_ENDS = ("weight", "bias")


def _token_packer_layout() -> Layout:
    names = {"q_proj_1.weight": ("query.weight",)}
    names |= {f"clip_attn.in_proj_{end}": (f"attention.in_proj_{end}",) for end in _ENDS}
    modules = {"clip_attn.out_proj": "attention.out_proj"}
    modules |= {f"ln_{letter}_1": f"norm_{part}" for letter, part in (("q", "query"), ("k", "key"), ("v", "value"))}
    for theirs, ours in (("k_proj_1", "key"), ("v_proj_1", "value"), ("mlp", "projection")):
        modules |= {f"{theirs}.{layer}": f"{ours}.{layer}" for layer in (0, 2)}
    return Layout("mm_projector.", names | _modules(modules))


def _cos_layout(connector: ResamplerConfig, depths: tuple[int, ...]) -> Layout:
    names: dict[str, tuple[str, ...]] = {}
    modules = {"ln_out": "norm", "out_proj": "projection"}
    for level, (window, queries) in enumerate(zip(connector.windows, connector.queries, strict=True)):
        names[f"cls_token_w{window}_q{queries}"] = (f"levels.{level}.queries",)
        for index, depth in enumerate(depths):
            end, block = f"0_w{window}_l{depth}_q{queries}", f"levels.{level}.blocks.{index}"
            names[f"attn_{end}.to_q.weight"] = (f"{block}.attention.query.weight",)
            names[f"attn_{end}.to_kv.weight"] = (f"{block}.attention.key_value.weight",)
            modules[f"attn_{end}.proj"] = f"{block}.attention.out"
            modules[f"attn_{end}.query_norm"] = f"{block}.attention.norm_query"
            modules[f"attn_{end}.cont_norm"] = f"{block}.attention.norm_features"
            modules[f"ln_{end}"] = f"{block}.mlp.0"
            modules[f"mlp_{end}.fc1"] = f"{block}.mlp.1"
            modules[f"mlp_{end}.fc2"] = f"{block}.mlp.3"
    batched = frozenset(name for name in names if name.startswith("cls_token"))
    return Layout("mm_projector.", names | _modules(modules), batched=batched)


def _trained_resampler(source: Path, connector: ResamplerConfig, stored: Iterable[str]) -> ResamplerConfig:
    """The windows and queries that the names of a Chain-of-Sight file tell; its largest window is the whole grid."""
    found = [match for name in stored if (match := re.fullmatch(r"cls_token_w(\d+)_q(\d+)", name))]
    if not found:
        raise CheckpointError(f"{source}: no mm_projector.cls_token_w*_q*; connector.type resampler reads those")
    sizes = sorted(((int(match[1]), int(match[2])) for match in found), reverse=True)
    return replace(connector, windows=tuple(w for w, _ in sizes), queries=tuple(q for _, q in sizes))
