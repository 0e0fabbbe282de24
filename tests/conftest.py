"""Shared fixtures: a small real corpus (a few files of the standard library) and a tiny experiment on it."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from mue.kernels import build, library
from mue.moe.backends import native

torch.set_num_threads(1)

FILES = (
    "argparse.py",
    "ast.py",
    "bdb.py",
    "calendar.py",
    "cmd.py",
    "dis.py",
    "enum.py",
    "heapq.py",
    "inspect.py",
    "typing.py",
)

EXPERIMENT = """
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
sequence = 32
[base.training]
batch = 128
steps = 40
[data]
source = "texts"
cache = "cache"
[run]
eval_every = 10
eval_sequences = 8
log_every = 5
[sweep]
lr = [0.002, 0.008, 0.032]
weight_decay = [0.1]
init_std = [0.05, 0.1]
runner = "processes"
"""


@pytest.fixture(scope="session")
def kernel() -> None:
    """The native kernel is there."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    native.build()
    library.forget()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for name in FILES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, folder / name)
    return folder


@pytest.fixture
def experiment(tmp_path: Path, texts: Path) -> Path:
    """``experiment.toml`` beside a ``texts`` folder."""
    (tmp_path / "texts").symlink_to(texts)
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path
