"""Reading CLIP vision weights: open_clip directories, open_clip weight files, transformers CLIP directories.

All three end as a :class:`VisionCheckpoint` whose tensors carry the names of ``vision.ClipVisionTower``. Nothing is
downloaded; pickled files are read with ``weights_only=True``.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip import CLIPVisionCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig

from skipvision_train.errors import CheckpointError
from skipvision_train.models.settings import OPENAI_MEAN, OPENAI_STD
from skipvision_train.models.weights import WeightFiles, read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)

# Fields of open_clip's vision configuration that the tower follows, or that act in training only or after the blocks.
_UNDERSTOOD = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_WITHOUT_EFFECT = {
    "patch_dropout",
    "attentional_pool",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "final_ln_after_pool",
    "pool_type",
    "output_tokens",
}

_TRANSFORMERS_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # transformers' spelling
    "post_layernorm": "ln_post",
}
_TRANSFORMERS_BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class VisionCheckpoint:
    """A CLIP vision checkpoint in memory.

    Attributes:
        source: the file or directory, for messages.
        facts: the fields of ``VisionConfig`` that the weights fix: ``image_size`` (the resolution they were trained
            at), ``patch_size``, ``width``, ``layers``, ``heads``, ``mlp_ratio``, ``quick_gelu``, ``image_mean``,
            ``image_std``. Only ``depths`` and the resolution to run at are the caller's.
        state: the vision transformer's tensors under the tower's names, all blocks, dtype as stored.
        other: names of the tensors that belong to no vision transformer (the text tower, the logit scale).
    """

    source: str
    facts: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    other: tuple[str, ...] = field(default=(), repr=False)


def vision_facts(architecture: str) -> dict[str, Any]:
    """The facts of an open_clip architecture by name, as in :attr:`VisionCheckpoint.facts`; needs no weights.

    OpenAI's weights need the ``-quickgelu`` variant of their architecture.

    Raises:
        CheckpointError: the name is unknown, or the architecture is no plain vision transformer.
    """
    if architecture not in (known := open_clip.list_models()):
        near = get_close_matches(architecture, known, n=3)
        raise CheckpointError(f"architecture: open_clip knows no {architecture!r}; near names: {', '.join(near)}")
    return _open_clip_facts({"model_cfg": open_clip.get_model_config(architecture)}, f"architecture {architecture}")


def read_vision_checkpoint(path: Path, architecture: str | None = None, contents: bool = True) -> VisionCheckpoint:
    """Read a CLIP checkpoint of any of three formats onto the CPU.

    * a directory with ``open_clip_config.json`` and open_clip weights (safetensors, ``.bin`` or ``.pt``);
    * one open_clip weights file, with ``architecture`` (such as ``ViT-L-14-quickgelu``) saying what it holds;
    * a transformers directory of model type ``clip`` or ``clip_vision_model`` (safetensors or ``pytorch_model.bin``,
      sharded or not), converted to open_clip's names.

    A directory states its own architecture; ``architecture`` is read for a single file only.

    Args:
        path: the file or directory.
        architecture: open_clip's name.
        contents: false reads configurations and headers alone; the tensors are on "meta" then.

    Raises:
        CheckpointError: nothing there, a file that cannot be read, or a model that is no plain CLIP transformer.
    """
    path = Path(path)
    if path.is_file():
        if architecture is None:
            raise CheckpointError(f"{path}: one weights file; name its open_clip architecture, e.g. ViT-L-14-quickgelu")
        return _from_open_clip(vision_facts(architecture), WeightFiles.open(path, contents=contents))
    if (path / OPEN_CLIP_CONFIG).is_file():
        facts = _open_clip_facts(read_json(path / OPEN_CLIP_CONFIG), str(path / OPEN_CLIP_CONFIG))
        return _from_open_clip(facts, WeightFiles.open(path, OPEN_CLIP_WEIGHTS, contents))
    if (path / "config.json").is_file():
        return _from_transformers(path, contents)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist")
    raise CheckpointError(f"{path}: neither a weights file nor a directory with {OPEN_CLIP_CONFIG} or config.json")


def _open_clip_facts(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Facts from the content of an ``open_clip_config.json``; refuses what the tower cannot compute."""
    model = config.get("model_cfg", {})
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{where}: model_cfg.vision_cfg is missing")
    defaults = {f.name: f.default for f in fields(CLIPVisionCfg) if f.default is not MISSING}
    for name, value in vision.items():
        plain = name in _WITHOUT_EFFECT or (name in defaults and value == defaults[name])
        if name in _UNDERSTOOD:
            plain = name != "layers" or isinstance(value, int)  # a list of stages is a ResNet
        if not plain:
            raise CheckpointError(f"{where}: vision_cfg.{name} = {value!r}; only plain CLIP transformers can be read")
    values = {**defaults, **vision}
    preprocess = config.get("preprocess_cfg") or {}
    return {
        "image_size": _side(values["image_size"], f"{where}: vision_cfg.image_size"),
        "patch_size": _side(values["patch_size"], f"{where}: vision_cfg.patch_size"),
        "width": values["width"],
        "layers": values["layers"],
        "heads": values["width"] // values["head_width"],
        "mlp_ratio": values["mlp_ratio"],
        "quick_gelu": bool(model.get("quick_gelu", False)),
        "image_mean": tuple(preprocess.get("mean") or OPENAI_MEAN),
        "image_std": tuple(preprocess.get("std") or OPENAI_STD),
    }


def _transformers_facts(path: Path) -> dict[str, Any]:
    """Facts from ``config.json`` and, for mean and deviation, ``preprocessor_config.json`` if there is one."""
    content = read_json(path / "config.json")
    where = str(path / "config.json")
    if content.get("model_type") == "clip":
        config = cast(CLIPVisionConfig, CLIPConfig.from_dict(content).vision_config)
    elif content.get("model_type") == "clip_vision_model":
        config = CLIPVisionConfig.from_dict(content)
    else:
        raise CheckpointError(f"{where}: model_type {content.get('model_type')!r}; use clip or clip_vision_model")
    if config.hidden_act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{where}: hidden_act {config.hidden_act!r}; use quick_gelu or gelu")
    if config.layer_norm_eps != 1e-5:
        raise CheckpointError(f"{where}: layer_norm_eps {config.layer_norm_eps}; the tower computes with 1e-05")
    processor = path / "preprocessor_config.json"
    preprocess = read_json(processor) if processor.is_file() else {}
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "image_size": _side(config.image_size, f"{where}: image_size"),
        "patch_size": _side(config.patch_size, f"{where}: patch_size"),
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "quick_gelu": config.hidden_act == "quick_gelu",
        "image_mean": tuple(preprocess.get("image_mean") or OPENAI_MEAN),
        "image_std": tuple(preprocess.get("image_std") or OPENAI_STD),
    }


def _side(value: Any, where: str) -> int:
    """A side length given as a number or as two equal numbers."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise CheckpointError(f"{where} is {value!r}; only squares can be read")
    return int(sides.pop())


def _from_open_clip(facts: dict[str, Any], weights: WeightFiles) -> VisionCheckpoint:
    prefix = "visual."
    vision = [name for name in weights.tensors if name.startswith(prefix)]
    if not vision:
        raise CheckpointError(f"{weights.source}: no tensor is named {prefix}*; is this an open_clip checkpoint?")
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.read(vision).items()}
    other = sorted(name for name in weights.tensors if not name.startswith(prefix))
    return VisionCheckpoint(str(weights.source), facts, state, tuple(other))


def _from_transformers(path: Path, contents: bool) -> VisionCheckpoint:
    facts, weights = _transformers_facts(path), WeightFiles.open(path, contents=contents)
    # CLIPModel names its vision part, CLIPVisionModel of transformers 5 does not.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights.tensors) else ""
    stored = {name.removeprefix(prefix): name for name in weights.tensors if name.startswith(prefix)}
    plain, fused = _open_clip_names(facts["layers"])
    plain = {theirs: ours for theirs, ours in plain.items() if theirs in stored}
    for parts in fused.values():
        if absent := [name for name in parts if name not in stored]:
            raise CheckpointError(f"{path}: {prefix}{absent[0]} is missing")
    # Older checkpoints also hold position ids, which are neither weights nor floats.
    used = [stored[name] for name in (*plain, *(name for parts in fused.values() for name in parts))]
    tensors = weights.read(used)
    state = {ours: tensors[stored[theirs]] for theirs, ours in plain.items()}
    state.update({ours: torch.cat([tensors[stored[name]] for name in parts]) for ours, parts in fused.items()})
    return VisionCheckpoint(str(path), facts, state, tuple(sorted(set(weights.tensors) - set(used))))


def _open_clip_names(layers: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """transformers' name -> open_clip's; and open_clip's name -> the three that it fuses: queries, keys, values."""
    plain: dict[str, str] = {}
    fused: dict[str, list[str]] = {}
    for theirs, ours in _TRANSFORMERS_NAMES.items():
        plain.update({f"{theirs}{end}": f"{ours}{end}" for end in ("", ".weight", ".bias")})
    for layer in range(layers):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            for module, name in _TRANSFORMERS_BLOCK_NAMES.items():
                plain[f"{theirs}.{module}.{end}"] = f"{ours}.{name}.{end}"
            fused[f"{ours}.attn.in_proj_{end}"] = [f"{theirs}.self_attn.{letter}_proj.{end}" for letter in "qkv"]
    return plain, fused
