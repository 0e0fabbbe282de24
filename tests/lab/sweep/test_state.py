"""Where the facts of a sweep live: its folder is read back, and one is made of a shared storage alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mue.lab.sweep.report import sweep_report
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState, join
from mue.lab.sweep.storage import Database
from mue.plan.toml import read_toml
from mue.util.files import digest


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    return sweep_from(read_toml(experiment), experiment.parent)


def test_a_sweep_is_read_back_as_it_was_written(spec: SweepSpec, tmp_path: Path) -> None:
    url = "postgresql://me:secret@db/sweeps"
    state = SweepState(tmp_path / "out", spec, spec.identity("0" * 64), url)
    state.save()
    assert SweepState.load(tmp_path / "out") == replace(state, storage="postgresql://me@db/sweeps")
    assert "secret" not in (tmp_path / "out" / "sweep.json").read_text()
    with pytest.raises(ValueError, match=r"holds no sweep \(no sweep.json\)"):
        SweepState.load(tmp_path)


def test_a_machine_that_had_no_part_in_it_reports_from_the_shared_storage(spec: SweepSpec, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with pytest.raises(ValueError, match="there is no storage"):
        join(tmp_path / "here", url, None)
    assert not (tmp_path / "shared.db").exists()
    Database(url)
    with pytest.raises(ValueError, match="holds no sweep"):
        join(tmp_path / "here", url, None)
    trials = SweepState(tmp_path / "there", spec, spec.identity("0" * 64), url).open_trials()
    trials.ask({"identity": spec.identity("0" * 64), "spec": spec.to_dict()}, sampler_of(spec.grid).points(), only=True)
    join(tmp_path / "here", url, None)
    assert "6 trials" in sweep_report(tmp_path / "here").read_text()
    with pytest.raises(ValueError, match="holds a sweep, which knows its storage"):
        join(tmp_path / "here", url, None)
    second = SweepState(tmp_path / "there", spec, spec.identity("1" * 64), url).open_trials()
    second.ask({"identity": spec.identity("1" * 64), "spec": spec.to_dict()}, [], only=False)
    with pytest.raises(ValueError, match=r"--study:\n  [0-9a-f]{16} .*40 steps of 128 tokens"):
        join(tmp_path / "other", url, None)
    join(tmp_path / "other", url, digest(spec.identity("1" * 64)))
    assert SweepState.load(tmp_path / "other").identity["data"] == "1" * 64
