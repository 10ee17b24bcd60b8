"""``skipvision generate``: answer one prompt about images."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError


@dataclass
class Config:
    """Settings of ``skipvision generate``."""

    checkpoint: str = "???"
    """Model directory."""
    prompt: str = "???"
    """What is asked. ``<image>`` stands where an image stands; without any marker the images come first."""
    image: list[str] = field(default_factory=list)
    """Image files in the order of their markers."""
    system: str | None = None
    """A system message before the prompt; null for none."""
    plan: PlanSpec = field(default_factory=lambda: PlanSpec("own"))
    """The plan: a file of ``conf/plan`` and its fields, or a plan file's path; ``own`` is what the checkpoint has."""
    max_new_tokens: int = 128
    """Where an answer without an end is cut."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""


def run(cfg: Config) -> None:
    """Load the model, answer, print the answer on stdout."""
    if cfg.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {cfg.max_new_tokens}; at least 1")
    from skipvision_train.data.collate import collate
    from skipvision_train.data.images import load_image
    from skipvision_train.data.records import IMAGE_MARKER, Turn
    from skipvision_train.evaluation.evaluate import generate_answers, on_device
    from skipvision_train.inference.loading import load_for_inference

    model, processor = load_for_inference(cfg.checkpoint, cfg.plan, cfg.device, cfg.precision)
    text = cfg.prompt
    if IMAGE_MARKER not in text:
        text = "\n".join([IMAGE_MARKER] * len(cfg.image) + [text])
    turns = [Turn("user", text)] if cfg.system is None else [Turn("system", cfg.system), Turn("user", text)]
    example = processor.encode_prompt(turns, [load_image(path, "of the prompt") for path in cfg.image])
    batch = on_device(model, collate([example], padding_side="left", pad_id=processor.pad_id))
    sys.stdout.write(generate_answers(model, processor, batch, cfg.max_new_tokens)[0] + "\n")
