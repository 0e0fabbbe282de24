"""Images in numbers, and what a shape with them counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mue
from mue.shapes import shape_from_dict

DIGITS = mue.Image(size=8, channels=1, patch=2, classes=10)
DENSE = mue.Dense(width=64, ffn=128, layers=3, head_dim=16, image=DIGITS)


def test_patches_are_the_tokens() -> None:
    assert (DIGITS.tokens, DIGITS.patch_elements, DENSE.sequence) == (16, 4, 16)
    assert mue.Image(32, 3, 4, 10).tokens == 64
    assert mue.Dense(width=64, ffn=128, layers=3).sequence == 1024  # without images as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "do not divide images of 8"),
        ({"channels": 0}, "image.channels"),
        ({"classes": 1.5}, "image.classes"),
    ],
)
def test_numbers_that_no_image_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DIGITS, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": 17}, "has 16: leave sequence out"),
        ({"vocab": 300}, "vocab is of a language model"),
        ({"tied": True}, "tied is of a language model"),
        ({"image": {"size": 8}}, "mue.Image"),
    ],
)
def test_shapes_that_contradict_their_images(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DENSE, **changes)


def test_a_dictionary_and_back() -> None:
    moe = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, image=DIGITS)
    mixed = mue.Mixed(64, (mue.Block(layers=1, ffn=64), *moe.blocks), head_dim=16, image=DIGITS)
    for shape in (DENSE, moe, mixed):
        assert shape_from_dict(shape.to_dict()) == shape
    assert (
        "image" not in replace(DENSE, image=None, sequence=16).to_dict()
    )  # hashes of language models are as they were


def test_counts_of_a_small_one_by_hand() -> None:
    d, L = 64, 3
    blocks = L * (4 * d * d + 6 * d * d + 3 * d * 128 + 2 * d + 2 * 16)
    around = 4 * d + 256 * d + d * d + 11 * d + d + 2 * d * d + 4 * d
    assert DENSE.parameters == blocks + around
    assert "embedding" not in DENSE.counts()
    # a modulation is multiplied once for all 16 tokens of an image
    token = L * (4 * d * d + 3 * d * 128) + 4 * d + 4 * d
    image = L * 6 * d * d + 256 * d + d * d + 2 * d * d
    assert DENSE.flops_per_token == 6 * (token + image / 16) + 12 * L * d * 16
