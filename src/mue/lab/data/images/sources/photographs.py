"""Random crops of scikit-learn's two sample photographs, a temple and a flower."""

from __future__ import annotations

import hashlib

import numpy as np

from mue.lab.data.images.part import Part
from mue.lab.data.images.source import IMAGE_SOURCES, sklearn_datasets

NAME, SIZE, SMALLEST, LARGEST = "photographs", 16, 8, 32
CROPS = 4096  # of each photograph; a crop of 16 in a tile of 64 has 49² places, in 60 tiles: few come twice
TILE = 64


@IMAGE_SOURCES.register(NAME)
def photographs(size: int | None, fraction: float) -> list[Part]:
    """Crops of both photographs, the class says of which.

    A photograph is cut into tiles and a crop lies in one tile, so that what is held out (whole tiles) shares no pixel with what is
    trained on, which crops drawn anywhere would.
    """
    size = SIZE if size is None else size
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f'source = "{NAME}" has crops of {SMALLEST} to {LARGEST} pixels, not of {size}')
    found = sklearn_datasets(NAME).load_sample_images()
    classes = tuple(name.rpartition("/")[2].removesuffix(".jpg") for name in found.filenames)
    train, held_out = [], []
    for number, photograph in enumerate(found.images):
        tiles = _tiles(photograph)
        # The tiles with the lowest hashes; a number of them that is rounded, since a dozen drawn one by one are far from the fraction.
        order = sorted(range(len(tiles)), key=lambda i: hashlib.sha256(f"{number} {i}".encode()).digest())
        cut = min(max(1, round(fraction * len(tiles))), len(tiles) - 1)
        count = round(CROPS * fraction)
        held_out.append(_crops(tiles[order[:cut]], size, max(1, count), seed=2 * number))
        train.append(_crops(tiles[order[cut:]], size, CROPS - count, seed=2 * number + 1))
    return [
        Part(NAME, np.concatenate(crops), np.repeat(np.arange(len(crops)), [len(c) for c in crops]), classes, held)
        for crops, held in ((train, False), (held_out, True))
    ]


def _tiles(photograph: np.ndarray) -> np.ndarray:
    """The whole tiles of a photograph, as (tiles, channels, rows, columns)."""
    rows, columns = (side // TILE for side in photograph.shape[:2])
    cut = photograph[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE, 3)
    return cut.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, TILE, TILE)


def _crops(tiles: np.ndarray, size: int, count: int, seed: int) -> np.ndarray:
    draw = np.random.RandomState(seed)  # of NumPy's generators the one whose numbers are promised never to change
    which, top, left = (draw.randint(n, size=count) for n in (len(tiles), *[TILE - size + 1] * 2))
    span = np.arange(size)
    out: np.ndarray = tiles[
        which[:, None, None, None],
        np.arange(3)[:, None, None],
        (top[:, None] + span)[:, None, :, None],
        (left[:, None] + span)[:, None, None, :],
    ]
    return out
