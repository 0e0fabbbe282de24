"""Images in memory, in two parts, and what a run records of them.

Shape suffixes: N images, C channels (1 grey, 3 red, green and blue), H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.int64]
Skipped = Mapping[str, tuple[str, ...]]
"""What was left out: the names, by the reason."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their classes, and where the line runs between what is trained on and what is held out.

    Attributes:
        train, held_out: pixels (N, C, H, W), uint8. train_class, held_out_class: (N,), int64: places in ``classes``.
        classes: their names. hash: sha256 of pixels, classes and split: the same images give it on any machine, under any path.
        skipped: the names of what was left out, by the reason; never silent.
    """

    kind: ClassVar[str] = "images"

    train: Pixels
    train_class: Classes
    held_out: Pixels
    held_out_class: Classes
    classes: tuple[str, ...]
    hash: str
    skipped: Skipped = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        C, H, W = self.train.shape[1:]
        return C, H, W

    def describe(self) -> dict[str, Any]:
        """What a result file records about its data: JSON-ready, no paths."""
        return {
            "kind": self.kind,
            "hash": self.hash,
            "train_images": len(self.train),
            "held_out_images": len(self.held_out),
            "shape": list(self.shape),
            "classes": list(self.classes),
            "skipped": {reason: len(names) for reason, names in self.skipped.items()},
        }

    def summary(self) -> str:
        """A line for people, with the names of what was left out."""
        C, H, W = self.shape
        colours = {1: "grey", 3: "RGB"}[C]
        out = (
            f"{len(self.train):,} images of {H} x {W} in {colours}, {len(self.held_out):,} held out, {len(self.classes)} classes,"
            f" sha256 {self.hash[:16]}"
        )
        left = "; ".join(f"{reason}: {listed(names)}" for reason, names in self.skipped.items())
        return out + (f" (left out: {left})" if left else "")


def listed(names: tuple[str, ...] | list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
