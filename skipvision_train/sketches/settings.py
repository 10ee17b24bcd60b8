"""The settings of the embedded data set and of its starting checkpoints; light to import, checked at once.

The sizes are not frozen because Hydra composes into them: they are what ``skipvision sketches`` is configured with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from skipvision_train.errors import ConfigError


@dataclass
class LanguageSize:
    """The LLaMA-architecture starting checkpoint.

    Attributes:
        width: channels of the hidden states.
        layers: decoder layers.
        heads: query heads; the size of a head is ``width / heads`` and must be even for the rotary embedding.
        key_value_heads: heads of keys and values (grouped-query attention); a divisor of ``heads``.
        ffn: hidden width of the gated FFN.
        vocabulary: token ids in all, the 256 bytes and the 16 special tokens among them.
        init_std: standard deviation of the random weights.
        max_positions: longest sequence that the configuration states.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    ffn: int = 384
    vocabulary: int = 512
    init_std: float = 0.05
    max_positions: int = 1024


@dataclass
class VisionSize:
    """The CLIP starting checkpoint.

    Attributes:
        image_size: pixels per side that the position embedding is made for.
        patch_size: pixels per side of a patch.
        width: channels of the hidden states.
        layers: transformer blocks.
        head_width: channels per attention head.
    """

    image_size: int = 96
    patch_size: int = 16
    width: int = 128
    layers: int = 3
    head_width: int = 32


@dataclass
class DataSize:
    """How many images a split holds and how they are written.

    Attributes:
        pretrain: images with a caption.
        sft: images with a conversation.
        heldout: images with one question; tasks take turns, so a multiple of seven is balanced over the tasks.
        image_size: pixels per side of the square images.
        seed: all randomness follows from it and from the place of an image in its split.
    """

    pretrain: int = 12000
    sft: int = 8000
    heldout: int = 1400
    image_size: int = 96
    seed: int = 0


@dataclass(frozen=True)
class SketchSettings:
    """Everything that the written files depend on; the number of worker processes is not among it."""

    data: DataSize = field(default_factory=DataSize)
    llm: LanguageSize = field(default_factory=LanguageSize)
    vision: VisionSize = field(default_factory=VisionSize)

    def check(self) -> None:
        """Refuse sizes that cannot work.

        Raises:
            ConfigError: naming the field, its value and what would be right.
        """
        data, llm, vision = self.data, self.llm, self.vision
        for name in ("pretrain", "sft", "heldout"):
            if getattr(data, name) < 1:
                raise ConfigError(f"data.{name}: {getattr(data, name)} images; a split needs at least 1")
        if data.image_size < 32:
            raise ConfigError(f"data.image_size: {data.image_size} pixels; letters need at least 32")
        if llm.width % llm.heads or (llm.width // llm.heads) % 2:
            raise ConfigError(f"llm.heads: {llm.heads} must divide llm.width {llm.width} into heads of even size")
        if llm.heads % llm.key_value_heads:
            raise ConfigError(f"llm.key_value_heads: {llm.key_value_heads} must divide llm.heads {llm.heads}")
        if llm.vocabulary < 400:
            raise ConfigError(f"llm.vocabulary: {llm.vocabulary}; words of the questions need at least 400 ids")
        if vision.image_size % vision.patch_size:
            raise ConfigError(f"vision.patch_size: {vision.patch_size} must divide image_size {vision.image_size}")
        if vision.width % vision.head_width:
            raise ConfigError(f"vision.head_width: {vision.head_width} must divide vision.width {vision.width}")
