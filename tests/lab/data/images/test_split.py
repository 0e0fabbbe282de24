"""Which side an image is on, where some say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mue.lab.data import load_images
from mue.lab.data.images.part import Part
from mue.lab.data.images.split import image_set


def part(name: str, seed: int, held_out: bool | None) -> Part:
    pixels = np.random.RandomState(seed).randint(0, 256, (20, 1, 4, 4)).astype(np.uint8)
    return Part(name, pixels, np.zeros(20, np.int64), ("image",), held_out)


def test_sides_that_some_say_and_others_do_not_are_refused() -> None:
    """Drawn anew by hash, images of the test set would be trained on; where all say their side, it is as they say."""
    train, test = part("train.npy", 0, False), part("test.npy", 1, True)
    found = image_set([train, test], 0.1)
    assert (found.train == train.pixels).all() and (found.held_out == test.pixels).all()
    for said in ([train, test], [train], [test]):
        with pytest.raises(ValueError, match=r"more.npy says no side while others do: name it train or test"):
            image_set([*said, part("more.npy", 2, None)], 0.1)


def test_where_all_say_the_same_or_nothing_sides_are_drawn() -> None:
    silent = image_set([part("a.npy", 0, None), part("b.npy", 1, None)], 0.3)
    alike = image_set([part("a.npy", 0, False), part("b.npy", 1, False)], 0.3)
    assert silent.hash == alike.hash and 0 < len(silent.held_out) < 40


def test_files_of_a_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "test")):
        np.save(tmp_path / f"{name}.npy", part(name, i, None).pixels[:, 0])
    assert len(load_images([tmp_path]).held_out) == 20
    np.save(tmp_path / "extra.npy", part("extra", 2, None).pixels[:, 0])
    with pytest.raises(ValueError, match=r"extra.npy says no side while others do"):
        load_images([tmp_path])
