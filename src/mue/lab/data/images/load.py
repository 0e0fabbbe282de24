"""Images of any source as an :class:`~mue.lab.data.images.image_set.ImageSet`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from mue.lab.data.images.arrays import array_files, read_arrays
from mue.lab.data.images.files import Wanted, first_picture, pictures_of
from mue.lab.data.images.image_set import ImageSet
from mue.lab.data.images.part import Part
from mue.lab.data.images.source import IMAGE_SOURCES
from mue.lab.data.images.split import image_set
from mue.util.errors import nearest, positive, positive_int

Odd = Literal["refuse", "skip", "crop", "resize"]
Corrupt = Literal["refuse", "skip"]
ODD, CORRUPT, CHANNELS = get_args(Odd), get_args(Corrupt), (1, 3)


def load_images(
    source: str | Sequence[Path],
    *,
    validation_fraction: float = 0.1,
    size: int | None = None,
    channels: int | None = None,
    odd: Odd = "refuse",
    corrupt: Corrupt = "refuse",
) -> ImageSet:
    """Read images into memory.

    Args:
        source: a registered name (``"digits"``, ``"photographs"``); or paths of folders and files. A folder holds pictures (PNG, JPEG,
            WebP), the first folder inside it being the class, perhaps below ``train`` and ``val``; or files of arrays. Those are ``.npy``
            and ``.npz`` of shape (N, H, W), (N, H, W, C) or (N, C, H, W), MNIST's ``idx`` files (also ``.gz``) and CIFAR's
            binary version.
        validation_fraction: of images that are held out; not used where the files say which are.
        size: rows and columns of every picture; None: the size that most of them have. channels: 1 or 3; None: 3 where a picture has colours.
        odd: what becomes of pictures of another size: ``"crop"`` takes the middle, ``"resize"`` scales the shorter side and takes the middle.
        corrupt: what becomes of pictures that cannot be decoded.

    Returns:
        The images; what was skipped is in ``ImageSet.skipped`` by name.

    Raises:
        ValueError: with one line naming the thing and the fix.
    """
    validation_fraction = positive("validation_fraction", validation_fraction, below=1)
    size = None if size is None else positive_int("size", size)
    for key, value, known in (("odd", odd, ODD), ("corrupt", corrupt, CORRUPT)):
        if value not in known:
            raise ValueError(f"{key} = {value!r} does not exist{nearest(str(value), known)}")
    if channels is not None and channels not in CHANNELS:
        raise ValueError(f"channels must be 1 (grey) or 3 (red, green and blue), got {channels!r}")
    wanted = Wanted(size, channels, odd, corrupt)
    if isinstance(source, str):
        given = [name for name, value in wanted.given().items() if value and name != "size"]
        if given:
            raise ValueError(f'{given[0]} has no meaning with source = "{source}": leave it out')
        parts = IMAGE_SOURCES.lookup(source)(size, validation_fraction)
    else:
        parts = [part for path in source for part in _parts(path, wanted)]
    return image_set(parts, validation_fraction)


def _parts(path: Path, wanted: Wanted) -> list[Part]:
    """What a path holds: arrays where it is or has files of them, else pictures; both is refused."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the path (it is relative to {Path.cwd()})")
    files = array_files(path) if path.is_dir() else [path]
    if not files:
        return pictures_of(path, wanted)
    if path.is_dir() and (picture := first_picture(path)) is not None:
        raise ValueError(
            f"{path} has {files[0].name} and pictures ({picture}); name one of them, or move the other away"
        )
    given = [name for name, value in wanted.given().items() if value]
    if given:
        raise ValueError(f"{given[0]} has no meaning with {files[0]}, whose images have one size: leave it out")
    return [part for file in files for part in read_arrays(file)]
