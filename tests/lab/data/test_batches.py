"""Batches: their order, a pure function of seed and step, is pinned, complete and looks random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.data import Batches
from support.text_folders import stream


@settings(deadline=None, max_examples=60)
@given(length=st.integers(9, 700), sequence=st.integers(1, 8), batch=st.integers(1, 7), seed=st.integers(0, 10**12))
def test_an_epoch_visits_every_window_once(length: int, sequence: int, batch: int, seed: int) -> None:
    batches = Batches(stream(np.arange(length)), "train", sequence, batch, seed)
    n = batches.windows
    starts = torch.cat([batches.at(step)[0][:, 0] for step in range(3 * n // batch + 1)])[: 3 * n].reshape(3, n)
    for epoch in starts:
        epoch = epoch.sort().values
        assert (epoch.diff() == sequence + 1).all()  # non-overlapping, one offset for the whole epoch
        assert epoch[0] >= 0 and epoch[-1] + sequence < length


def test_targets_are_the_inputs_moved_by_one_and_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    corpus = stream(np.arange(100_000) % 251)
    one, two = (Batches(corpus, "train", 16, 8, seed=3) for _ in range(2))
    x, y = one.at(10**9)
    assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal((x + 1) % 251, y) and x.is_contiguous() and y.is_contiguous()
    for step in (0, 5, 3, 10**9):  # any order, any object
        assert all(torch.equal(a, b) for a, b in zip(one.at(step), two.at(step), strict=True))
    assert not torch.equal(one.at(0)[0], Batches(corpus, "train", 16, 8, seed=4).at(0)[0])


def test_the_order_is_pinned_so_that_runs_of_years_ago_can_be_repeated() -> None:
    x, _ = Batches(stream(np.arange(1000)), "train", 9, 5, seed=0).at(7)
    assert x[:, 0].tolist() == [179, 819, 499, 549, 129]


def test_the_order_looks_random() -> None:
    batches = Batches(stream(np.arange(1_000_000)), "train", 9, 1000, seed=0)
    places = torch.cat([batches.at(step)[0][:, 0] for step in range(99)]).numpy() // 10
    neighbours = np.corrcoef(places[:-1], places[1:])[0, 1]
    with_order = np.corrcoef(places, np.arange(len(places)))[0, 1]
    assert abs(neighbours) < 0.015 and abs(with_order) < 0.015  # about 4.5 standard deviations
    # Every decile of the text reaches every decile of the epoch: 100 cells of 990, standard deviation 30.
    cells = np.histogram2d(np.arange(len(places)), places, bins=10)[0]
    assert abs(cells - 990).max() < 150


def test_every_token_is_reached_through_the_offsets() -> None:
    batches = Batches(stream(np.arange(59)), "train", 9, 1, seed=1)
    seen = set(torch.cat([torch.cat(batches.at(step), 1) for step in range(400)]).flatten().tolist())
    assert seen == set(range(59))


def test_fixed_batches_cover_the_stream_evenly() -> None:
    batches = Batches(stream(np.arange(10_000)), "validation", 9, 4, seed=5)
    fixed = batches.fixed(10)
    assert len(fixed) == 10
    starts = torch.stack([x[:, 0] for x, _ in fixed])
    ordered = starts.flatten().sort().values
    assert ordered[0] == 0 and ordered[-1] == 9990 and ordered.diff().min() >= 10
    assert ordered.diff().max() - ordered.diff().min() <= 1
    assert (starts.max(1).values - starts.min(1).values > 7000).all()  # each batch spans the stream
    other = Batches(batches.corpus, "validation", 9, 4, seed=6).fixed(10)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(fixed, other, strict=True))
    assert len(batches.fixed(10**6)) == 250 and len(Batches(stream(np.arange(12)), "train", 9, 4).fixed(3)) == 1


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="8 tokens, shorter than one sequence of 8"):
        Batches(stream(np.arange(8)), "train", 8, 1)
    for bad in ({"sequence": 0}, {"batch_sequences": 0}, {"split": "test"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Batches(stream(np.arange(80)), **{"split": "train", "sequence": 8, "batch_sequences": 1, **bad})  # type: ignore[arg-type]
    batches = Batches(stream(np.arange(80)), "train", 8, 1)
    with pytest.raises(ValueError, match="no step -1"):
        batches.at(-1)
    with pytest.raises(ValueError, match="at least 1"):
        batches.fixed(0)
