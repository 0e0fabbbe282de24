"""What a reader of images hands on, before it is known what is held out."""

from __future__ import annotations

from dataclasses import dataclass, field

from mue.lab.data.images.image_set import Classes, Pixels, Skipped


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one origin: a source, a file, or one side of a folder.

    Attributes:
        name: as messages say it. pixels: (N, C, H, W). labels: (N,) places in ``classes``. classes: their names.
        held_out: whoever made the images says which side they are on; None: they do not.
        skipped: what was left out of them.
    """

    name: str
    pixels: Pixels
    labels: Classes
    classes: tuple[str, ...]
    held_out: bool | None = None
    skipped: Skipped = field(default_factory=dict)


TRAIN = frozenset({"train", "training"})
HELD_OUT = frozenset({"val", "valid", "validation", "test", "t10k"})


def side(word: str) -> bool | None:
    """Whether a name says that what bears it is held out (true), trained on (false), or neither (None)."""
    return True if word.lower() in HELD_OUT else False if word.lower() in TRAIN else None
