from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mue.lab.data import load_images
from mue.lab.data.images.load import CORRUPT, ODD, Odd
from support.pictures import picture, pictures


@pytest.mark.parametrize("name", ["stray.npy", "stray.npz", "stray.bin"])
def test_arrays_beside_pictures_are_refused(tmp_path: Path, name: str) -> None:
    """Neither is passed over without a word; each of them alone is read."""
    pictures(tmp_path / "photos")
    assert len(load_images([tmp_path / "photos"]).classes) == 2
    stray = tmp_path / "photos" / name
    images = np.random.RandomState(0).randint(0, 256, (20, 8, 8)).astype(np.uint8)
    if name.endswith(".bin"):
        stray.write_bytes(bytes(3073))
    else:
        np.save(stray, images) if name.endswith(".npy") else np.savez(stray, images=images)
    with pytest.raises(ValueError, match=rf"has {name} and pictures .cat/0.png.; name one of them"):
        load_images([tmp_path / "photos"])
    if not name.endswith(".bin"):
        assert load_images([stray]).classes == ("image",)


def test_what_lies_beside_arrays_and_is_no_picture_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.RandomState(0).randint(0, 256, (20, 8, 8)).astype(np.uint8))
    (tmp_path / "README.txt").write_text("about them")
    picture(tmp_path / ".git" / "logo.png", 0)
    assert load_images([tmp_path]).shape == (1, 8, 8)


def test_words_are_those_of_the_types() -> None:
    assert ODD == get_args(Odd) == ("refuse", "skip", "crop", "resize") and CORRUPT == ("refuse", "skip")
