"""Which layout is fastest: measured once, remembered by what it depends on, and said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mue.kernels import build
from mue.lab.data import Corpus
from mue.lab.runners.calibrate import Calibration, Measured
from mue.lab.runners.open import open_runner
from mue.lab.runners.pool import WorkerLayout
from mue.lab.train.run import Store
from support.dense_runs import dense_run


def test_the_layout_is_measured_once_and_said(
    tmp_path: Path, source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mue.lab.runners.calibrate.MEASURED_SECONDS", 0.2)
    run, store = dense_run(source, corpus), Store(tmp_path)
    first = open_runner("auto", store, example=run, runs=8)
    assert "measured in" in first.why
    assert "stacks of 4" in first.why
    assert "steps/s" in first.why
    (kept,) = (tmp_path / "cache" / "runner").glob("*.json")
    rows = json.loads(kept.read_text())["measured"]
    assert all(math.isfinite(row["rate"]) and row["rate"] > 0 for row in rows)
    assert not (tmp_path / "runs").exists()  # nothing of it in the user's folder
    again = open_runner("auto", store, example=run, runs=8)
    assert "measured before" in again.why
    assert again.slots == first.slots
    stacked = open_runner("stacked", store, example=run, runs=8)
    assert stacked.slots == 4
    assert open_runner("stacked", store, workers=6).slots == 6
    assert open_runner("processes", store, workers=3).slots == 3
    with pytest.raises(ValueError, match="give an example"):
        open_runner("auto", store)
    for runner in (first, again, stacked):
        runner.close()


def test_a_measurement_is_of_the_kernel_it_was_made_with(
    source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kernels = dense_run(source, corpus), [None, Path("one.so"), Path("two.so")]
    paths = []
    for kernel in [*kernels, *kernels]:
        monkeypatch.setattr(build, "find", lambda kernel=kernel: kernel)
        paths.append(Calibration(run, 2, ()).path)
    assert paths[:3] == paths[3:] and len(set(paths)) == 3


def test_what_goes_wrong_while_stacks_are_measured_is_no_lack_of_stacks(
    source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the question whether the run can be stacked is one to which an error is the answer."""
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    run = dense_run(source, corpus)

    def measured(self: Calibration, layout: WorkerLayout) -> Measured:
        if layout.stack > 1:
            raise ValueError("damaged")
        return Measured(layout, 1.0, 0.0)

    monkeypatch.setattr(Calibration, "measured", measured)
    with Calibration(run, 2, ()) as calibration:
        with pytest.raises(ValueError, match="damaged"):
            calibration.best("auto", 8, 80)
        monkeypatch.setattr(
            "mue.lab.runners.calibrate.check_stackable", lambda run: (_ for _ in ()).throw(ValueError("a reason: more"))
        )
        layout, why = calibration.best("auto", 8, 80)
        assert layout.stack == 1 and "a reason" in why
