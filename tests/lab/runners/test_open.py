"""Which runner a name stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.lab.runners.open import open_runner
from mue.lab.train.run import Store


def test_an_unknown_runner_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads"):
        open_runner("threads", Store(tmp_path))
