"""What tests of one run train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.lab.data import Corpus
from mue.lab.data.spec import open_corpus
from mue.lab.sweep.spec import sweep_from
from mue.plan.toml import read_toml


@pytest.fixture
def corpus(experiment: Path) -> Corpus:
    return open_corpus(sweep_from(read_toml(experiment), experiment.parent).source)
