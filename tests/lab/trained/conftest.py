"""A trained MoE, a trained dense model with a tokenizer, and a corpus in folders: once for all tests here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.trained import dense_run_of_words, moe_run_of_bytes


@pytest.fixture(scope="session")
def domains(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text with two folders in it, and a file of its own."""
    root = tmp_path_factory.mktemp("domains") / "data"
    for i, path in enumerate(sorted(texts.iterdir())):
        folder = root / ("", "one", "two")[0 if i == 9 else 1 + i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)
    return root


@pytest.fixture(scope="session")
def moe_run(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a MoE on bytes, whose balance biases have moved."""
    return moe_run_of_bytes(domains, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def dense_run(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a tied dense model on tokens of a byte-level tokenizer."""
    return dense_run_of_words(domains, tmp_path_factory.mktemp("dense"))
