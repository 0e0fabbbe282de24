"""Files of many images: NumPy's arrays, MNIST's idx files, CIFAR's binary version. None of them can run code when it is read."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mue.lab.data.images.files import ONE_CLASS, PICTURES
from mue.lab.data.images.image_set import Classes, Pixels
from mue.lab.data.images.part import Part, side

_IDX = re.compile(r"(.*)-images[-.]idx3-ubyte(\.gz)?")
_LABELS = re.compile(r".*[-_]labels([-.]idx1-ubyte(\.gz)?|\.npy)")
_NPZ = (("x_train", "y_train", False), ("x_test", "y_test", True), ("images", "labels", None), ("x", "y", None))
_CIFAR = {3073: "batches.meta.txt", 3074: "fine_label_names.txt"}
"""Bytes of an image of CIFAR-10 (a label, 32 x 32 pixels of three colours) and CIFAR-100 (two labels), and where the classes' names are."""
_CIFAR_SHAPE = (3, 32, 32)


def array_files(folder: Path) -> list[Path]:
    """The files of arrays that lie in a folder itself, by name; labels go with their images."""
    return sorted(f for f in folder.iterdir() if f.is_file() and _reader(f) and not _LABELS.fullmatch(f.name))


def read_arrays(path: Path) -> list[Part]:
    """The images of one file, a part for each side that it has. :func:`array_files` finds those of a folder.

    Raises:
        ValueError: the file is of an unknown kind, cut off, or not what its name says; its labels are missing or do not fit.
    """
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"{path}: {_unknown(path)}")
    try:
        return [_part(path, *read) for read in reader(path)]
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the file cannot be read ({error}); fetch it again") from error


def _part(path: Path, pixels: Pixels, label_N: Classes | None, classes: tuple[str, ...], held_out: bool | None) -> Part:
    if not len(pixels):
        raise ValueError(f"{path}: there is no image in it")
    if label_N is None:
        label_N, classes = np.zeros(len(pixels), np.int64), ONE_CLASS
    if len(label_N) != len(pixels):
        raise ValueError(f"{path}: {len(pixels)} images and {len(label_N)} labels; they must be as many")
    if label_N.min() < 0:
        raise ValueError(f"{path}: a label is {label_N.min()}; classes are counted from 0")
    names = classes or tuple(map(str, range(int(label_N.max()) + 1)))
    if label_N.max() >= len(names):
        raise ValueError(f"{path}: a label is {label_N.max()}, and there are {len(names)} names of classes")
    return Part(str(path), pixels, label_N, names, held_out)


_Read = tuple[Pixels, Classes | None, tuple[str, ...], bool | None]
"""Pixels, labels and names of the classes where there are any, and the side that the file says."""


def _reader(path: Path) -> Callable[[Path], list[_Read]] | None:
    name = path.name.lower()
    if _IDX.fullmatch(name):
        return _idx
    if name.endswith(".bin"):
        return _cifar
    return {".npy": _npy, ".npz": _npz}.get(path.suffix.lower())


def _unknown(path: Path) -> str:
    if path.suffix.lower() in PICTURES:
        return "one picture is no data set; name the folder it lies in"
    if re.match(r"(data_batch_\d|test_batch|train|test|meta)$", path.name) or path.suffix in (".pkl", ".pickle", ".pt"):
        return (
            "the file is pickled, and reading it would run whatever code it holds; use CIFAR's binary version, or .npz"
        )
    return "the suffix is unknown; images are read from a folder of pictures, .npy, .npz, MNIST's *-images-idx3-ubyte or CIFAR's *.bin"


def _npy(path: Path) -> list[_Read]:
    beside = [p for sign in "-_" if (p := path.with_name(f"{path.stem}{sign}labels.npy")).exists()]
    label_N = _labels(_loaded(beside[0]), beside[0]) if beside else None
    return [(_pixels(_loaded(path), path), label_N, (), side(path.stem))]


def _npz(path: Path) -> list[_Read]:
    held = _loaded(path)
    found = [arrays for arrays in _NPZ if arrays[0] in held]
    if not found:
        wanted = ", ".join(f"{x} (and {y})" for x, y, _ in _NPZ)
        raise ValueError(f"{path} has the arrays {', '.join(held)}; images are looked for as {wanted}: store them so")
    names = tuple(map(str, held["classes"])) if "classes" in held else ()
    return [
        (
            _pixels(held[x], path),
            _labels(held[y], path) if y in held else None,
            names,
            side(path.stem) if held_out is None else held_out,
        )
        for x, y, held_out in found
    ]


def _loaded(path: Path) -> Any:
    """The array of a ``.npy``, or those of a ``.npz`` by name."""
    try:
        found = np.load(path, allow_pickle=False)
        return dict(found) if path.suffix.lower() == ".npz" else found
    except (ValueError, TypeError) as error:  # of objects, which are pickled; or no array at all
        raise ValueError(
            f"{path}: it holds no arrays of numbers ({error}); store them with numpy.save or savez"
        ) from error


def _pixels(array: Any, path: Path) -> Pixels:
    """Any usual layout as (N, C, H, W) of uint8."""
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4:
        raise ValueError(
            f"{path}: the images have shape {array.shape}; it must be (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
    if not (first or last):
        raise ValueError(f"{path}: of shape {array.shape} neither the second nor the last axis has 1 or 3 channels")
    if last and not first:
        array = array.transpose(0, 3, 1, 2)
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"{path}: floating pixels must lie between 0 and 1; scale them, or store 0 to 255 as uint8"
            )
        array = np.rint(array * 255)
    elif array.dtype != np.uint8:
        raise ValueError(f"{path}: pixels of {array.dtype}; store 0 to 255 as uint8, or 0 to 1 as floats")
    return np.ascontiguousarray(array, np.uint8)


def _labels(array: Any, path: Path) -> Classes:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: labels of {array.dtype}; they must be whole numbers, counted from 0")
    return array.reshape(-1).astype(np.int64)  # type: ignore[no-any-return]


def _idx(path: Path) -> list[_Read]:
    labels = path.with_name(path.name.replace("-images", "-labels").replace("idx3", "idx1"))
    if not labels.exists():
        raise ValueError(f"{path}: its labels are missing; put {labels.name} beside it")
    which = _IDX.fullmatch(path.name.lower())
    held_out = side(which[1] if which else "")
    return [(_idx_array(path, 3)[:, None], _idx_array(labels, 1).astype(np.int64), (), held_out)]


def _idx_array(path: Path, axes: int) -> Pixels:
    """MNIST's format: two zeros, the type of the numbers (8: a byte), how many axes, their sizes in four bytes each, the numbers."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    start = 4 + 4 * axes
    # a header that is cut off itself has no whole sizes
    whole = len(content) >= start and content[:4] == bytes((0, 0, 8, axes))
    sizes = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4")) if whole else ()
    if not whole or len(content) != start + math.prod(sizes):
        raise ValueError(f"{path}: the file is cut off or no idx file of {axes} axes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()


def _cifar(path: Path) -> list[_Read]:
    size = path.stat().st_size
    fits = [length for length in _CIFAR if size and size % length == 0]
    # the names decide where a size allows both, as 3073 x 3074 bytes do
    length = fits[0] if len(fits) == 1 or "batch" in path.name else fits[-1] if fits else 0
    if not length:
        raise ValueError(
            f"{path}: {size} bytes are no whole number of CIFAR's images ({' or '.join(map(str, _CIFAR))} each); fetch it again"
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, length)
    names = path.with_name(_CIFAR[length])
    classes = tuple(names.read_text(encoding="utf-8").split()) if names.exists() else ()
    held_out = side(path.stem.partition("_")[0])
    held_out = False if path.stem.startswith("data_batch") else held_out
    return [(rows[:, -3072:].reshape(-1, *_CIFAR_SHAPE), rows[:, length - 3073].astype(np.int64), classes, held_out)]
