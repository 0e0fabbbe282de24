"""Files that are no checkpoint: one clear line each, and nothing of theirs runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from mue.layouts.torch_file import read_torch


def written(kind: str, path: Path) -> Path:
    if kind in ("module", "nested module"):
        torch.save(torch.nn.Linear(3, 3) if kind == "module" else {"model": torch.nn.Linear(3, 3)}, path)
    elif kind == "cut":
        torch.save({"x": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:600])
    elif kind == "other pickle":
        path.write_bytes(pickle.dumps(Path("/")))
    else:
        path.write_bytes({"empty": b"", "text": b"hello world, this is text\n", "zeros": bytes(5000)}[kind])
    return path


WORDS = {
    "module": r"holds a pickled torch\.nn\.modules\.linear\.Linear.*model\.state_dict\(\)",
    "nested module": "holds a pickled torch",
    "other pickle": "is no checkpoint|holds a pickled",
    "empty": "is empty",
    "text": "is no checkpoint, or a damaged one",
    "zeros": "is no checkpoint, or a damaged one",
    "cut": "is no checkpoint, or a damaged one",
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", WORDS)
def test_what_is_no_checkpoint_is_said_to_be_none(kind: str, mmap: bool, tmp_path: Path) -> None:
    path = written(kind, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=f"file.pt ({WORDS[kind]})") as found:
        read_torch(path, "cpu", mmap=mmap)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("old", [True, False])
def test_a_checkpoint_is_read(old: bool, tmp_path: Path) -> None:
    """The negative control; the format of before torch 1.6 too, which cannot be mapped."""
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    assert read_torch(tmp_path / "a.pt", "cpu", mmap=True)["x"].sum() == 3
    assert read_torch(tmp_path / "a.pt", "meta")["x"].is_meta
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "b.pt", "cpu")
