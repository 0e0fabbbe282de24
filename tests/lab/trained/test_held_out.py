"""mue.lab.trained.held_out: how many windows there are of a text, and where they lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mue.lab.trained.held_out import windows_of


@given(st.integers(0, 300), st.integers(2, 300), st.integers(1, 20), st.integers(1, 24))
def test_windows_are_as_many_as_are_asked_for_or_fit(train: int, validation: int, sequence: int, count: int) -> None:
    corpus: Any = SimpleNamespace(train=np.arange(train), validation=1000 + np.arange(validation))
    windows = windows_of(corpus, sequence, count)
    rows = [[*x.tolist(), y[-1].item()] for xs, ys in windows for x, y in zip(xs, ys, strict=True)]
    fit = [max(1, n // (sequence + 1)) for n in (train, validation) if n > 1]
    assert 1 <= len(rows) <= count
    if count <= min(fit) or len(fit) == 1:
        assert len(rows) == min(count, sum(fit))
    # consecutive tokens of one half, none read twice, each window as long as was asked for or its half is
    for row in rows:
        half = validation if row[0] >= 1000 else train
        assert row == list(range(row[0], row[0] + min(sequence + 1, half)))
    read = [token for row in rows for token in row]
    assert len(set(read)) == len(read)
    if count > 1 and len(fit) == 2:
        assert {row[0] >= 1000 for row in rows} == {True, False}
