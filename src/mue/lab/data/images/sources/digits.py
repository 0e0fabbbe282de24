"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from mue.lab.data.images.part import Part
from mue.lab.data.images.source import IMAGE_SOURCES, sklearn_datasets

NAME, SIDE, INKS = "digits", 8, 16


@IMAGE_SOURCES.register(NAME)
def digits(size: int | None, fraction: float) -> list[Part]:
    """1,797 digits of 8 x 8 in 17 shades, white on black: the test set of "Optical Recognition of Handwritten Digits" (UCI, 1998)."""
    if size not in (None, SIDE):
        raise ValueError(f'source = "{NAME}" has images of {SIDE} x {SIDE}, not of {size}: leave size out')
    found = sklearn_datasets(NAME).load_digits()
    pixels = np.rint(found.images * (255 / INKS)).astype(np.uint8)[:, None]
    return [Part(NAME, pixels, found.target.astype(np.int64), tuple(map(str, found.target_names)))]
