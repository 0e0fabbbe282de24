from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from mue.lab.data import load_images


def test_digits_are_scikit_learns() -> None:
    found, theirs = load_images("digits"), load_digits()
    assert found.shape == (1, 8, 8) and len(found.train) + len(found.held_out) == 1797
    assert 120 <= len(found.held_out) <= 240 and len(set(found.held_out_class)) == 10
    of = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): c
        for image, c in zip(theirs.images, theirs.target, strict=True)
    }
    assert all(of[image.tobytes()] == c for image, c in zip(found.train, found.train_class, strict=True))
    assert found.train.max() == 255 and found.hash == load_images("digits").hash
    assert found.hash != load_images("digits", validation_fraction=0.2).hash


def test_what_is_held_out_of_photographs_shares_no_pixel_with_what_is_trained_on() -> None:
    found = load_images("photographs", size=32, validation_fraction=0.25)
    assert found.shape == (3, 32, 32) and found.classes == ("china", "flower")
    assert len(found.held_out) == pytest.approx(0.25 * (len(found.held_out) + len(found.train)), rel=0.01)
    for c, photograph in enumerate(load_sample_images().images):
        seen = np.zeros((2, *photograph.shape[:2]), bool)
        for i, (images, label) in enumerate(((found.train, found.train_class), (found.held_out, found.held_out_class))):
            for image in images[label == c][:100]:
                top, left = _place(image.transpose(1, 2, 0), photograph)
                seen[i, top : top + 32, left : left + 32] = True
        assert seen.any((1, 2)).all() and not (seen[0] & seen[1]).any()


def _place(crop: np.ndarray[Any, Any], photograph: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The one place in a photograph where a crop of 32 is from."""
    like = (photograph[:-31, :-31] == crop[0, 0]).all(-1)
    found = [(y, x) for y, x in np.argwhere(like) if (photograph[y : y + 32, x : x + 32] == crop).all()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("digits", {"size": 16}, "has images of 8 x 8, not of 16: leave size out"),
        ("photographs", {"size": 64}, "crops of 8 to 32 pixels, not of 64"),
        ("digits", {"odd": "skip"}, 'odd has no meaning with source = "digits"'),
        ("digit", {}, "unknown source of images 'digit'; did you mean 'digits'"),
    ],
)
def test_what_a_source_has_not(source: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_images(source, **options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"in the images extra: pip install 'mue\[images\]"):
        load_images("digits")
