"""A folder of pictures: found, decoded, brought to one size; those that cannot be are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mue.lab.data.images.image_set import Pixels, listed
from mue.lab.data.images.part import Part, side
from mue.lab.data.sources import EXCLUDED_FOLDERS, walk_folders
from mue.util.errors import extra

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
ONE_CLASS = ("image",)
_GREY = frozenset({"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"})
_CORRUPT, _ODD = "corrupt", "odd size"


@dataclass(frozen=True)
class Wanted:
    """How pictures are to come out; see :func:`mue.lab.data.images.load.load_images`."""

    size: int | None
    channels: int | None
    odd: str
    corrupt: str

    def given(self) -> Mapping[str, bool]:
        """Which of these differ from what they are when nobody says anything."""
        default = Wanted(None, None, "refuse", "refuse")
        return {name: getattr(self, name) != getattr(default, name) for name in vars(self)}


@dataclass(frozen=True)
class _Picture:
    """A file of a folder; ``label`` is the name of its class, ``held_out`` what the folder says of its side."""

    name: str
    path: Path
    label: str
    held_out: bool | None


def pictures_of(root: Path, wanted: Wanted) -> list[Part]:
    """The pictures of a folder, a part for each side that it names.

    Raises:
        ValueError: there are none, some have no class, or some are corrupt or odd and that is refused.
    """
    pillow(root)
    left: dict[str, list[str]] = {}
    found = _found(root, left)
    if not found:
        others = f" ({listed(left['no picture'])})" if "no picture" in left else ""
        raise ValueError(f"{root}: no pictures{others}; it needs files with one of {' '.join(sorted(PICTURES))}")
    opened = _opened(found, left)
    size = (wanted.size, wanted.size) if wanted.size else _most_common([size for _, size, _ in opened])
    channels = wanted.channels or (1 if all(mode in _GREY for _, _, mode in opened) else 3)
    pixels: list[tuple[_Picture, Pixels]] = []
    for picture, own, _ in opened:
        if not _fits(own, size, wanted.odd):
            left.setdefault(_ODD, []).append(f"{picture.name} ({own[0]} x {own[1]})")
            continue
        try:
            pixels.append((picture, _decoded(picture.path, size, channels, wanted.odd)))
        except (
            OSError,
            ValueError,
            SyntaxError,
        ) as error:  # what pillow raises of a file that ends too early, among others
            left.setdefault(_CORRUPT, []).append(f"{picture.name} ({error})")
    _refuse(root, left, size, wanted)
    classes = tuple(sorted({picture.label for picture in found}))
    parts, skipped = [], {reason: tuple(sorted(names)) for reason, names in left.items()}
    for held_out in sorted({picture.held_out for picture, _ in pixels}, key=str):
        mine = [(picture, image) for picture, image in pixels if picture.held_out == held_out]
        label_N = np.array([classes.index(picture.label) for picture, _ in mine], np.int64)
        parts.append(Part(str(root), np.stack([image for _, image in mine]), label_N, classes, held_out, skipped))
        skipped = {}
    if not parts:
        raise ValueError(
            f"{root}: none of its {len(found)} pictures can be used ({_counts(left)}); see odd and corrupt of [data]"
        )
    return parts


def pillow(path: Path) -> Any:
    """The package that decodes pictures; ``ValueError`` where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ValueError(f"{path}: pictures need pillow, in the images extra: {extra('images')}") from None
    return PIL


def first_picture(root: Path) -> str | None:
    """The name below ``root`` of a picture that lies there; None where there is none."""
    for _, inside, names in walk_folders(root, EXCLUDED_FOLDERS, lambda *_: None):
        for name in sorted(names):
            if Path(name).suffix.lower() in PICTURES:
                return (inside / name).as_posix()
    return None


def _found(root: Path, left: dict[str, list[str]]) -> list[_Picture]:
    """The pictures below ``root`` by name; other files go to ``left``.

    The first folder is the class. Where the first folders are sides (train and val), those below them are.
    """

    def skip(reason: str, name: str) -> None:
        left.setdefault(reason, []).append(name)

    files: list[tuple[Path, Path]] = []
    for folder, inside, names in walk_folders(root, EXCLUDED_FOLDERS, skip):
        for name in names:
            if Path(name).suffix.lower() in PICTURES:
                files.append((folder / name, inside / name))
            elif not name.startswith("."):  # .DS_Store and its like
                skip("no picture", (inside / name).as_posix())
    tops = {inside.parts[0] for _, inside in files if len(inside.parts) > 1}
    sided = bool(tops) and all(side(top) is not None for top in tops) and {side(top) for top in tops} == {True, False}
    depth = 1 if sided else 0
    bare = [inside.as_posix() for _, inside in files if len(inside.parts) < depth + 2]
    if bare and len(bare) < len(files):
        raise ValueError(
            f"{root}: {listed(bare)} lies in no folder of a class while others do; move it into one, or away"
        )
    return sorted(
        (
            _Picture(
                inside.as_posix(),
                path,
                ONE_CLASS[0] if bare else inside.parts[depth],
                side(inside.parts[0]) if sided else None,
            )
            for path, inside in files
        ),
        key=lambda picture: picture.name,
    )


def _opened(found: list[_Picture], left: dict[str, list[str]]) -> list[tuple[_Picture, tuple[int, int], str]]:
    """Each picture with (rows, columns) and mode as its header says them, which costs no decoding."""
    out = []
    PIL = pillow(Path())
    for picture in found:
        try:
            with PIL.Image.open(picture.path) as image:
                columns, rows = image.size
                turned = image.getexif().get(0x0112, 1) >= 5  # the camera lay on its side (Exif 2.32, orientation)
                out.append((picture, (columns, rows) if turned else (rows, columns), image.mode))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            what = "cannot be read as a picture" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
            left.setdefault(_CORRUPT, []).append(f"{picture.name} ({what})")
    return out


def _most_common(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size that most have; of several, the larger."""
    count = Counter(sizes)
    return max(count, key=lambda size: (count[size], size)) if count else (0, 0)


def _fits(own: tuple[int, int], size: tuple[int, int], odd: str) -> bool:
    """Whether a picture of one size can be brought to another as asked: a crop needs as many pixels."""
    if odd == "crop":
        return own[0] >= size[0] and own[1] >= size[1]
    return odd == "resize" or own == size


def _decoded(path: Path, size: tuple[int, int], channels: int, odd: str) -> Pixels:
    """The pixels (C, H, W) of a picture, upright."""
    PIL = pillow(path)
    with PIL.Image.open(path) as opened:
        image: Image = PIL.ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # pillow would cut brighter pixels off at 255
            image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of kind {image.mode}, not of 8 or 16 bits")
        if image.has_transparency_data:  # pixels under nothing have any colour, often black
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        rows, columns = size
        if (image.height, image.width) != size:
            if odd == "resize":
                image = PIL.ImageOps.fit(image, (columns, rows), PIL.Image.Resampling.LANCZOS)
            top, left = (image.height - rows) // 2, (image.width - columns) // 2
            image = image.crop((left, top, left + columns, top + rows))
        array = np.asarray(image, np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _refuse(root: Path, left: Mapping[str, list[str]], size: tuple[int, int], wanted: Wanted) -> None:
    """Say what cannot be used, where that is to stop the reading."""
    if _CORRUPT in left and wanted.corrupt == "refuse":
        raise ValueError(
            f"{root}: {len(left[_CORRUPT])} of its pictures cannot be decoded: {listed(left[_CORRUPT])}; mend or remove them, or say"
            ' corrupt = "skip"'
        )
    if _ODD in left and wanted.odd != "skip":
        smaller = "smaller than" if wanted.odd == "crop" else "not of"
        ways = '"skip" or "resize"' if wanted.odd == "crop" else '"skip", "crop" or "resize"'
        raise ValueError(
            f"{root}: {len(left[_ODD])} of its pictures are {smaller} {size[0]} x {size[1]}: {listed(left[_ODD])}; say size, or odd = {ways}"
        )


def _counts(left: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} x {reason}" for reason, names in left.items())
