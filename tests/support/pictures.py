"""Folders of pictures to load images from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, number: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    """A picture of noise, another for each number; size is (rows, columns)."""
    shape = (*size, 3) if mode == "RGB" else size
    pixels = np.random.RandomState(number).randint(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode="RGB" if mode == "RGB" else "L").save(path)
    return path


def pictures(root: Path, *, each: int = 12, classes: tuple[str, ...] = ("cat", "dog"), mode: str = "L") -> Path:
    """``each`` pictures in a folder for every class."""
    for c, name in enumerate(classes):
        for i in range(each):
            picture(root / name / f"{i}.png", 1000 * c + i, mode=mode)
    return root
