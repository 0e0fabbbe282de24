"""Which images are held out, and the hash of the whole."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from mue.lab.data.images.image_set import Classes, ImageSet, Pixels
from mue.lab.data.images.part import Part

FORMAT = b"mue-images-1"  # part of every hash: change it when the same images would be split or stored in another way


def image_set(parts: list[Part], fraction: float) -> ImageSet:
    """Parts as one set.

    Where parts say themselves which side they are on, and both sides are there, they are taken at their word. Where none
    says it, or all say the same, the sides are drawn by a hash of each image's pixels: adding an image moves no other, and
    two that are the same are on one side, so that none that is held out was trained on.

    Args:
        fraction: of images that are held out, where nobody says which.

    Raises:
        ValueError: the parts have images of several shapes or classes of several names, some say their side and others do not,
            or one side would be empty.
    """
    shapes = {part.pixels.shape[1:]: part.name for part in parts}
    if len(shapes) > 1:
        (one, first), (other, second), *_ = shapes.items()
        raise ValueError(
            f"{first} has images of {one} and {second} of {other} (channels, rows, columns): give them one at a time"
        )
    classes = _classes(parts)
    pixels, label_N = np.concatenate([p.pixels for p in parts]), np.concatenate([p.labels for p in parts])
    sides_said = {part.held_out: part.name for part in parts}
    if None in sides_said and len(sides_said) > 1:  # drawn anew, images that somebody else tests on would be trained on
        raise ValueError(
            f"{sides_said[None]} says no side while others do: name it train or test (folders: put train and val into it), or leave it out"
        )
    if len(sides_said) == 2:
        held = np.concatenate([np.full(len(p.pixels), p.held_out) for p in parts])
    else:
        held = drawn(pixels, fraction)
    if held.all() or not held.any():
        empty = "trained on" if held.all() else "held out"
        raise ValueError(
            f"{parts[0].name}: no image would be {empty} of {len(held)} that there are; give more images that differ"
        )
    skipped: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for reason, names in part.skipped.items():
            skipped[reason] = (*skipped.get(reason, ()), *names)
    sides = pixels[~held], label_N[~held], pixels[held], label_N[held]
    return ImageSet(*sides, classes, _hash(classes, *sides), skipped)


def drawn(pixels: Pixels, fraction: float) -> npt.NDArray[np.bool_]:
    """Which images are held out by a hash of their pixels; one at least on each side, where two differ."""
    place = np.array([int.from_bytes(_digest(image.tobytes())[:8], "big") / 2**64 for image in pixels])
    held: npt.NDArray[np.bool_] = place < fraction
    if not held.any():
        held = place == place.min()
    elif held.all():
        held = place != place.max()
    return held


def _classes(parts: list[Part]) -> tuple[str, ...]:
    """The names that all parts share; of numbers, as many as the part with most has."""
    longest = max((part.classes for part in parts), key=len)
    for part in parts:
        if part.classes != longest[: len(part.classes)]:
            raise ValueError(
                f"{part.name} has the classes {part.classes}, others have {longest}: give them one at a time"
            )
    return longest


def _hash(
    classes: tuple[str, ...], train: Pixels, train_class: Classes, held_out: Pixels, held_out_class: Classes
) -> str:
    sha = hashlib.sha256(FORMAT)
    sha.update(repr((classes, train.shape, held_out.shape)).encode())
    for pixels, label_N in ((train, train_class), (held_out, held_out_class)):
        sha.update(np.ascontiguousarray(pixels).tobytes())
        sha.update(label_N.astype("<i8").tobytes())
    return sha.hexdigest()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
