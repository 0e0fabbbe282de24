"""Pixels as a model sees them, numbers in [-1, 1], and back. torch is imported where it is needed, as by what else reads data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mue.lab.data.images.image_set import Pixels

if TYPE_CHECKING:
    from torch import Tensor


def numbers(pixels: Pixels) -> Tensor:
    """Bytes, 0 to 255, as float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def to_bytes(images: Tensor) -> Pixels:
    """The inverse of :func:`numbers`: the nearest byte of each; what lies outside of [-1, 1] is cut off."""
    import torch

    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
