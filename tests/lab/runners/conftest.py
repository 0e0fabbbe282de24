"""What tests of runners train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.lab.data import Corpus
from mue.lab.data.spec import open_corpus


@pytest.fixture(scope="module")
def source(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {"source": [str(texts)], "cache": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def corpus(source: dict[str, object]) -> Corpus:
    return open_corpus(source)
