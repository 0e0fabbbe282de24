from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mue.lab.data import load_images
from support.pictures import picture, pictures


def test_folders_are_classes_and_every_picture_is_on_one_side(tmp_path: Path) -> None:
    found = load_images([pictures(tmp_path)], validation_fraction=0.3)
    assert found.classes == ("cat", "dog") and found.shape == (1, 8, 8) and not found.skipped
    both = np.concatenate([found.train, found.held_out])
    label = np.concatenate([found.train_class, found.held_out_class])
    for c, name in enumerate(found.classes):
        wanted = {np.asarray(Image.open(p)).tobytes() for p in (tmp_path / name).iterdir()}
        assert {image.tobytes() for image in both[label == c]} == wanted and (label == c).sum() == 12


def test_a_picture_more_moves_no_other_and_copies_stay_together(tmp_path: Path) -> None:
    before = load_images([pictures(tmp_path)], validation_fraction=0.3)
    picture(tmp_path / "cat" / "more.png", 77)
    for i in range(12):  # the same again, under other names
        picture(tmp_path / "cat" / f"copy {i}.png", i)
    after = load_images([tmp_path], validation_fraction=0.3)
    of = lambda images: {image.tobytes() for image in images}  # noqa: E731
    assert of(before.train) <= of(after.train) and of(before.held_out) <= of(after.held_out)
    assert not of(after.train) & of(after.held_out)
    assert after.hash != before.hash


def test_the_hash_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    one, other = (load_images([pictures(tmp_path / name)]) for name in ("a", "b"))
    assert one.hash == other.hash
    assert one.hash != load_images([pictures(tmp_path / "c", classes=("cat", "cow"))]).hash


def test_sides_that_a_folder_names_are_taken_at_their_word(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    for i in range(3):
        picture(tmp_path / "val" / "dog" / f"{i}.png", 500 + i)
    found = load_images([tmp_path])
    assert len(found.train) == 24 and len(found.held_out) == 3
    assert found.classes == ("cat", "dog") and set(found.held_out_class) == {1}


def broken(root: Path) -> Path:
    """Two corrupt pictures and two odd ones among sound ones."""
    pictures(root)
    whole = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "text.png").write_text("no picture")
    picture(root / "dog" / "wide.png", 1, (8, 20))
    picture(root / "dog" / "small.png", 2, (4, 4))
    (root / "dog" / "notes.txt").write_text("not one either")
    return root


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {},
            r"2 of its pictures cannot be decoded: (dog/text.png .*cat/cut.png|cat/cut.png.*dog/text.png).*corrupt = \"skip\"",
        ),
        (
            {"corrupt": "skip"},
            r"2 of its pictures are not of 8 x 8: dog/small.png .4 x 4., dog/wide.png .8 x 20.*odd = \"skip\", \"crop\"",
        ),
        ({"corrupt": "skip", "odd": "crop"}, r"1 of its pictures are smaller than 8 x 8: dog/small.png"),
        ({"odd": "cropp"}, "did you mean 'crop'"),
        ({"size": 0}, "size must be a whole number of at least 1"),
        ({"channels": 2}, "channels must be 1 .grey. or 3"),
        ({"validation_fraction": 1}, "validation_fraction must be greater than 0 and below 1"),
        ({"validation_fraction": "0.1"}, "validation_fraction must be .*'0.1'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_images([broken(tmp_path)], **options)


def test_what_is_skipped_is_named(tmp_path: Path) -> None:
    found = load_images([broken(tmp_path)], corrupt="skip", odd="skip")
    assert len(found.train) + len(found.held_out) == 24
    assert {reason: len(names) for reason, names in found.skipped.items()} == found.describe()["skipped"]
    assert found.describe()["skipped"] == {"corrupt": 2, "odd size": 2, "no picture": 1}
    assert "dog/wide.png (8 x 20)" in found.summary() and "dog/notes.txt" in found.summary()


def test_crops_are_the_middle_and_resized_pictures_keep_their_proportions(tmp_path: Path) -> None:
    pictures(tmp_path, classes=("cat",))
    ramp = np.tile(np.arange(20, dtype=np.uint8) * 10, (8, 1))
    Image.fromarray(ramp).save(tmp_path / "cat" / "ramp.png")
    crop = load_images([tmp_path], odd="crop")
    assert any((image[0] == ramp[:, 6:14]).all() for image in (*crop.train, *crop.held_out))
    half = load_images([tmp_path], odd="resize", size=4)
    both = np.concatenate([half.train, half.held_out])
    assert half.shape == (1, 4, 4)
    # the middle half of the ramp, which rises by 20 a pixel at half its size
    assert any(np.abs(np.diff(image[0].astype(int), axis=1)[:, 1] - 20).max() <= 2 for image in both)


def test_colours_depths_and_turned_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "grey", classes=("a",))
    assert load_images([tmp_path / "grey"], channels=3).shape == (3, 8, 8)
    pictures(tmp_path / "colour", classes=("a",), mode="RGB")
    assert load_images([tmp_path / "colour"]).shape == (3, 8, 8)
    assert load_images([tmp_path / "colour"], channels=1).shape == (1, 8, 8)
    deep = np.full((8, 8), 40000, np.uint16)
    deep[0] = 65535
    Image.fromarray(deep).save(tmp_path / "grey" / "a" / "deep.png")
    found = load_images([tmp_path / "grey"])
    assert any(
        (image[0, 0] == 255).all() and (image[0, 1:] == 40000 // 257).all() for image in (*found.train, *found.held_out)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (12, 8)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "jpegs" / "a").mkdir(parents=True)
    (tmp_path / "turned.jpg").rename(tmp_path / "jpegs" / "a" / "turned.jpg")
    Image.new("L", (8, 12), 200).save(tmp_path / "jpegs" / "a" / "upright.webp")
    assert load_images([tmp_path / "jpegs"]).shape == (3, 12, 8)  # WebP has colours always


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (255, 0, 0)), ("LA", (0,)), ("P", None)])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str, colour: tuple[int, ...] | None) -> None:
    """Nothing is white whatever colour lies under it, half is half way there, and what is opaque stays."""
    pictures(tmp_path, classes=("a",))
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:2], alpha[2:4] = 255, 51
    if colour is None:
        palette = Image.fromarray((alpha == 0).astype(np.uint8))
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.save(tmp_path / "a" / "clear.png", transparency=1)
    else:
        layers = [np.full((8, 8), c, np.uint8) for c in colour]
        Image.fromarray(np.stack([*layers, alpha], -1), mode).save(tmp_path / "a" / "clear.png")
    found = load_images([tmp_path], channels=3)
    first = np.array(colour or (0,)) * np.ones(3, int)
    wanted = [first, first + (255 - first) * 4 // 5 if colour else first, np.full(3, 255)]
    assert any(np.array_equal(image[:, [0, 2, 4], 3].T, wanted) for image in (*found.train, *found.held_out))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: root / "nothing", "no such file or folder"),
        (lambda root: root, "no pictures; it needs files with one of .jpeg .jpg .png .webp"),
        (lambda root: picture(root / "a.png", 1), "one picture is no data set; name the folder"),
        (
            lambda root: picture(pictures(root) / "bare.png", 1).parent,
            "bare.png lies in no folder of a class while others do",
        ),
        (lambda root: pictures(root, each=1, classes=("a",)), "no image would be trained on of 1"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_images([make(tmp_path)])
