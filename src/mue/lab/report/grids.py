"""Images side by side in one: the pixels of a grid, and a PNG of them."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import numpy.typing as npt

from mue.util.files import write_atomic

Pixels = npt.NDArray[np.uint8]
_CELL = 48  # pixels of a small image's side, at least: an image of 8 x 8 is seen at six times its size
_GAP = 1 / 8  # of an image's side
_PAPER = 255


def grid(images: Pixels, columns: int) -> Pixels:
    """Images row by row in one, each pixel a square, on white.

    Args:
        images: (N, C, H, W). columns: images in a row.

    Returns:
        (rows, columns, 3) of pixels.
    """
    N, _, H, W = images.shape
    zoom = max(1, -(-_CELL // min(H, W)))
    gap = max(1, round(_GAP * zoom * min(H, W)))
    h, w, rows = zoom * H + gap, zoom * W + gap, -(-N // columns)
    out = np.full((rows * h + gap, columns * w + gap, 3), _PAPER, np.uint8)
    for n, image in enumerate(images):
        top, left = gap + n // columns * h, gap + n % columns * w
        large = image.transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
        out[top : top + zoom * H, left : left + zoom * W] = large  # one channel is broadcast to three
    return out


def write_png(path: Path, pixels: Pixels) -> None:
    """Write (rows, columns, 3) as a PNG, atomically."""
    stream = io.BytesIO()
    matplotlib.image.imsave(stream, pixels, format="png")
    content = stream.getvalue()

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)
