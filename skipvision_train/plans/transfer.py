"""Sending what the CPU has decided to the device, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host goes on at once.

    A copy from ordinary memory makes the host wait until a GPU has done everything that was asked of it before: kernels
    can no longer be queued ahead, and the GPU idles at every such place. From pinned memory it does not wait.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
