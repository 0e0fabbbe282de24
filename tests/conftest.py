"""What all tests share: the native kernel, dice that can be rolled again, a small real corpus and a tiny experiment on it."""

from __future__ import annotations

import contextlib
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from mue.kernels import build
from mue.moe.backends import native

torch.set_num_threads(1)
# an example that takes long on a busy machine is no failure: the whole test has its time limit
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


pytest_plugins = ["support.dice"]


def pytest_configure(config: pytest.Config) -> None:
    """Builds the native kernel, once, before any test and any worker process begins.

    A kernel that appeared while tests are running would part what is promised to be the same to the bit: half of a
    comparison would be trained without it.
    """
    if hasattr(config, "workerinput") or config.option.collectonly or build.compiler() is None:
        return
    with contextlib.suppress(ValueError, build.BuildError):  # the fixture builds again, and its tests show the error
        native.build()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own is the same alone, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
def kernel() -> Path:
    """The native kernel; where there is a compiler, a build that breaks fails the tests that ask for it."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return native.build()


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Tensors are of float64 where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


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
