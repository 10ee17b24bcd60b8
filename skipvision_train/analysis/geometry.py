"""The sizes of well-known decoders, so that FLOPs and speed can be had without weights.

The numbers stand in ``conf/geometry/*.yaml`` and nowhere else; a file may build on others by its ``defaults``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipvision_train.config.specs import VisionSpec
from skipvision_train.errors import ConfigError
from skipvision_train.resources import resource_dir

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from skipvision_train.models.settings import VisionConfig


@dataclass
class Geometry:
    """The sizes of a decoder and, where it has one, of its CLIP tower."""

    name: str
    """The file's name; papers' settings are looked up by it."""
    model_type: str
    """transformers' name of the decoder's configuration."""
    vocab_size: int
    """Rows of the LM head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward network."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; divides the query heads."""
    head_dim: int | None = None
    """Channels per head; null: ``hidden_size`` over ``num_attention_heads``."""
    vision: VisionSpec | None = None
    """The CLIP tower; null where the tower is no CLIP or is not fixed."""


def geometry_names() -> list[str]:
    """The geometries under ``conf/geometry``, sorted."""
    return sorted(path.stem for path in (resource_dir("conf") / "geometry").glob("*.yaml"))


def load_geometry(name: str) -> Geometry:
    """The geometry of ``conf/geometry/<name>.yaml``.

    Raises:
        ConfigError: there is none of that name, or it lacks a number.
    """
    if name not in geometry_names():
        raise ConfigError(f"geometry: {name!r} is unknown; use {', '.join(geometry_names())}")
    values = _read(name)
    vision = values.pop("vision", None)
    geometry = Geometry(**values, vision=None if vision is None else VisionSpec(**vision))
    check_geometry(geometry)
    return geometry


def _read(name: str) -> dict[str, Any]:
    """A file's values over those of the files that its ``defaults`` name; nested values replace as a whole."""
    import yaml

    own = yaml.safe_load((resource_dir("conf") / "geometry" / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for parent in own.pop("defaults", []):
        merged |= _read(parent)
    return merged | own


def check_geometry(geometry: Geometry) -> None:
    """Refuse sizes that no decoder can have.

    Raises:
        ConfigError: naming the field.
    """
    for field in dataclasses.fields(Geometry):
        value = getattr(geometry, field.name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"geometry.{field.name}: {value}; at least 1")
    heads, shared = geometry.num_attention_heads, geometry.num_key_value_heads
    if heads % shared:
        raise ConfigError(
            f"geometry.num_key_value_heads: {shared} does not divide geometry.num_attention_heads {heads}"
        )
    if geometry.head_dim is None and geometry.hidden_size % heads:
        raise ConfigError(
            f"geometry.num_attention_heads: {heads} does not divide geometry.hidden_size {geometry.hidden_size}; "
            "use another number or give geometry.head_dim"
        )


def text_config(geometry: Geometry) -> PreTrainedConfig:
    """A transformers configuration of the decoder: its sizes, and the family's defaults for everything else.

    Raises:
        ConfigError: transformers does not know the ``model_type``, or refuses the sizes for it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    sizes = {k: v for k, v in vars(geometry).items() if k not in ("name", "model_type", "vision") and v is not None}
    try:
        return AutoConfig.for_model(geometry.model_type, **sizes)
    except ValueError as error:
        raise ConfigError(f"geometry.model_type: {geometry.model_type!r} is unknown to transformers") from error
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"geometry: no {geometry.model_type} model has these sizes: {reason}") from error


def vision_config(geometry: Geometry) -> VisionConfig:
    """The CLIP tower's configuration.

    Raises:
        ConfigError: the geometry names no tower, or an impossible one.
    """
    from skipvision_train.models.settings import VisionConfig

    if geometry.vision is None:
        raise ConfigError(f"geometry.vision: {geometry.name} names no CLIP tower; set vision_tower=false")
    return VisionConfig(**dataclasses.asdict(geometry.vision))
