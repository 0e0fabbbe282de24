"""The threads of a run that is trained in this process: measured where nobody said how many, kept where it was interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mue.lab.data import Corpus
from mue.lab.runners import threads
from mue.lab.train.run import Run, Store
from mue.lab.train.session import TrainingSession, train
from support.small_run import Stop, moe_run, stop_at


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of eight cores on which nobody has said how many threads there are; afterwards they are as before."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(corpus: Corpus) -> Run:
    return moe_run(corpus, steps=60)


@pytest.mark.parametrize(
    ("rates", "best", "measured"),
    [
        ({8: 2.0, 4: 6.0, 2: 9.0, 1: 18.0}, 1, [8, 4, 2, 1]),  # others are at work
        ({8: 20.0, 4: 12.0, 2: 9.0, 1: 5.0}, 8, [8, 4]),  # a large model alone on the machine: the rest is not tried
        ({8: 20.0, 4: 19.0, 2: 9.0, 1: 50.0}, 8, [8, 4, 2]),
    ],
)
def test_the_fastest_number_is_set(
    rates: dict[int, float],
    best: int,
    measured: list[int],
    run: Run,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(threads, "_rate", lambda _: tried.append(torch.get_num_threads()) or rates[tried[-1]])
    told = threads.set_threads(run, Store(tmp_path), corpus)
    assert tried == measured and torch.get_num_threads() == best
    assert told.startswith(f"threads: {best}, {rates[best]:.3g} steps/s (") and "measured in" in told
    assert not list(tmp_path.iterdir())  # nothing of the run has begun


def test_what_is_measured_are_its_steps(
    run: Run, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MEASURED_SECONDS", 0.0)
    with TrainingSession(threads.endless(run, 0), tmp_path, corpus) as session:
        assert threads._rate(session) > 0 and session.step == threads.MEASURED_STEPS + 1


def test_what_somebody_said_is_kept(run: Run, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.get_num_threads()
    monkeypatch.setattr(threads, "_rate", lambda _: pytest.fail("nothing is to be measured"))
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", str(own))
    assert threads.set_threads(run, Store(tmp_path), corpus) == f"threads: {own}, as OMP_NUM_THREADS says"
    monkeypatch.delitem(os.environ, "OMP_NUM_THREADS")
    assert "not measured" in threads.set_threads(moe_run(corpus, steps=24), Store(tmp_path), corpus)
    monkeypatch.setattr(threads, "cores", lambda: 1)
    assert threads.set_threads(run, Store(tmp_path), corpus) == f"threads: {own}"


def test_an_interrupted_run_keeps_its_number(
    run: Run, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits depend on it, and a run that goes on is the same to the bit."""
    store = Store(tmp_path)
    torch.set_num_threads(2)
    with pytest.raises(Stop):
        train(run, store, corpus, checkpoint_seconds=0, progress=stop_at(4))
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_rate", lambda _: pytest.fail("nothing is to be measured"))
    assert threads.set_threads(run, store, corpus) == "threads: 2, as before the interruption"
    assert torch.get_num_threads() == 2
