"""What tells models apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

HASHED = 1000
"""How many values :func:`model_hash` takes from the beginning, from the end and from all over each tensor."""


def model_hash(model: nn.Module) -> str:
    """SHA-256, in hexadecimal digits, of a model's parameters: their names, shapes, types and some of their values.

    Of each parameter the first 1,000 values, the last 1,000 and 1,000 at equal distances count, as little-endian fp32:
    so a model of 8 B parameters takes seconds, and the hash is the same on every device and after saving and loading.
    Two models that were trained differently differ; a change of a few single weights may go unnoticed. The same weights
    in another precision are another model. Neither plan nor buffers count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(_some_values(parameter.detach()).numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _some_values(tensor: Tensor) -> Tensor:
    """(at most 3,000,) fp32 on the CPU."""
    flat = tensor.reshape(-1)
    spread = flat[:: max(1, flat.numel() // HASHED)][:HASHED]
    return torch.cat([flat[:HASHED], flat[-HASHED:], spread]).to("cpu", torch.float32)
