from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mue.lab.data import load_images


def noise(n: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.RandomState(n).randint(0, 256, (n, *shape)).astype(np.uint8)


def together(found: Any) -> set[bytes]:
    return {image.tobytes() for image in (*found.train, *found.held_out)}


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "floats"])
def test_arrays_in_any_layout_are_the_same_images(tmp_path: Path, layout: str) -> None:
    images = noise(20, 1, 6, 5) if layout == "NHW" else noise(20, 3, 6, 5)
    stored = {"NHW": images[:, 0], "NHWC": images.transpose(0, 2, 3, 1), "NCHW": images, "floats": images / 255}[layout]
    np.save(tmp_path / "a.npy", stored)
    found = load_images([tmp_path / "a.npy"])
    assert together(found) == {image.tobytes() for image in images} and found.classes == ("image",)


def test_labels_lie_beside_an_array_or_in_it(tmp_path: Path) -> None:
    images, label = noise(20, 6, 6), np.arange(20) % 3
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "a_labels.npy", label)
    np.savez(tmp_path / "b.npz", images=images, labels=label, classes=["x", "y", "z"])
    plain, named = load_images([tmp_path / "a.npy"]), load_images([tmp_path / "b.npz"])
    assert plain.classes == ("0", "1", "2") and named.classes == ("x", "y", "z")
    for found in (plain, named):
        of = dict(zip((i.tobytes() for i in images), label, strict=True))
        assert all(of[image.tobytes()] == c for image, c in zip(found.train, found.train_class, strict=True))


def test_sides_that_a_file_names(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "mnist.npz",
        x_train=noise(9, 5, 5),
        y_train=np.zeros(9, int),
        x_test=noise(4, 5, 5),
        y_test=np.ones(4, int),
    )
    found = load_images([tmp_path / "mnist.npz"])
    assert len(found.train) == 9 and len(found.held_out) == 4 and found.classes == ("0", "1")


def idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist(tmp_path: Path, end: str) -> None:
    images, label = noise(12, 28, 28), (np.arange(12) % 10).astype(np.uint8)
    for name, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        idx(tmp_path / f"{name}-images-idx3-ubyte{end}", images[part])
        idx(tmp_path / f"{name}-labels-idx1-ubyte{end}", label[part])
    found = load_images([tmp_path])
    assert (found.train[:, 0] == images[:8]).all() and (found.held_out_class == label[8:]).all()
    (tmp_path / f"t10k-labels-idx1-ubyte{end}").unlink()
    with pytest.raises(ValueError, match=f"put t10k-labels-idx1-ubyte{end} beside it"):
        load_images([tmp_path])


@pytest.mark.parametrize("left", [-1, 16, 15, 7, 4, 2, 0])
def test_an_idx_file_that_is_cut_off(tmp_path: Path, left: int) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", noise(4, 5, 5))
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: .*cut off or no idx file"):
        load_images([tmp_path])


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar(tmp_path: Path, labels: int) -> None:
    rows = noise(10, labels + 3072)
    rows[:, labels - 1] = np.arange(10) % 5
    names = ("data_batch_1.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin")
    (tmp_path / names[0]).write_bytes(rows[:7].tobytes())
    (tmp_path / names[1]).write_bytes(rows[7:].tobytes())
    (tmp_path / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt")).write_text("a\nb\nc\nd\ne\n")
    found = load_images([tmp_path])
    assert (found.train == rows[:7, labels:].reshape(-1, 3, 32, 32)).all() and len(found.held_out) == 3
    assert found.classes == tuple("abcde") and (found.held_out_class == rows[7:, labels - 1]).all()


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in a file was run",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", np.array([Harm()], object), "no arrays of numbers"),
        ("a.npz", {"images": np.array([Harm()], object)}, "no arrays of numbers"),
        ("data_batch_1", pickle.dumps(Harm()), "pickled.*binary version"),
        ("a.npy", noise(4, 5), "the images have shape .4, 5."),
        ("a.npy", noise(4, 5, 5, 5), "neither the second nor the last axis has 1 or 3 channels"),
        ("a.npy", noise(4, 5, 5).astype(np.int64), "pixels of int64; store 0 to 255 as uint8"),
        ("a.npy", noise(4, 5, 5) / 1.0, "must lie between 0 and 1"),
        ("a.npy", noise(4, 5, 5)[:0], "there is no image in it"),
        ("a.npz", {"pictures": noise(4, 5, 5)}, "has the arrays pictures; images are looked for as x_train"),
        ("a.npz", {"x": noise(4, 5, 5), "y": np.arange(3)}, "4 images and 3 labels"),
        ("a.npz", {"x": noise(4, 5, 5), "y": np.arange(4) - 1}, "a label is -1"),
        ("a.npz", {"x": noise(4, 5, 5), "y": np.arange(4) / 2}, "labels of float64"),
        ("a.npz", {"x": noise(4, 5, 5), "y": np.arange(4), "classes": ["a"]}, "a label is 3, and there are 1 names"),
        ("a.npz", b"PK", "cannot be read|no arrays of numbers"),
        ("a.bin", b"x" * 5000, "no whole number of CIFAR's images"),
        ("a.gif", b"GIF", "the suffix is unknown"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: Any, says: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=says):
        load_images([path])


def test_keys_of_pictures_and_files_of_two_shapes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(4, 5, 5))
    np.save(tmp_path / "b.npy", noise(4, 6, 6))
    with pytest.raises(ValueError, match=r"size has no meaning with .*a.npy"):
        load_images([tmp_path / "a.npy"], size=4)
    with pytest.raises(ValueError, match=r"has images of .1, 5, 5. and .*b.npy of .1, 6, 6."):
        load_images([tmp_path])
