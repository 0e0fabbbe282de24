"""``precision = "auto"`` on the command line: what is measured once is what all who train in the folder or the storage take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mue.lab.data.spec import open_corpus
from mue.lab.runners import precision
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.state import SweepState
from mue.plan.toml import read_toml
from support.command_line import in_process, refused

RUN = '[run]\nprecision = "auto"\n'  # in the place of the fixture's, for a file has one such table


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_measure", lambda run, corpus: {"fp32": 1.0, "bf16": 0.5})


def short(experiment: Path) -> str:
    """The fixture's file with few steps and rates, its [run] cut off."""
    text = experiment.read_text().replace("steps = 40", "steps = 3").replace("0.008, 0.032]", "0.008]")
    before, table, after = text.partition("[run]\n")
    assert table
    return before + after.partition("\n[")[1] + after.partition("\n[")[2]


def settings_in(folder: Path) -> set[str]:
    return {json.loads(p.read_text())["settings"]["precision"] for p in folder.glob("runs/*/config.json")}


def test_a_run_is_trained_in_what_was_measured(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n"
    experiment.write_text(short(experiment) + tuned + RUN)
    said = ("train", experiment, "-o", tmp_path / "t")
    code, out, err = in_process(capsys, monkeypatch, *said)
    assert code == 0, err
    assert "precision: bf16 (fp32 1e+03 ms a step, bf16 500 ms a step)" in out and settings_in(tmp_path / "t") == {
        "bf16"
    }
    code, out, _ = in_process(capsys, monkeypatch, *said)
    assert code == 0 and "as decided" in out and len(list(tmp_path.glob("t/runs/*"))) == 1


def test_a_sweep_takes_the_precision_of_its_storage(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = short(experiment)
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    experiment.write_text(text + '[run]\nprecision = "fp32"\n')  # as a machine without bf16 decided
    spec = sweep_from(read_toml(experiment), tmp_path)
    first = SweepState.start(tmp_path / "first", spec, open_corpus(spec.source), shared)
    first.ask(first.open_trials(), first)
    experiment.write_text(text + RUN)
    for out, storage, found in (
        ("second", ("--storage", shared), "fp32"),
        ("alone", (), "bf16"),
    ):  # the latter: the control
        code, _, err = in_process(capsys, monkeypatch, "sweep", experiment, "-o", tmp_path / out, *storage)
        assert code == 0, err
        assert settings_in(tmp_path / out) == {found}


def test_a_dry_run_measures_nothing_and_a_wrong_text_leaves_nothing(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, out = short(experiment) + RUN, tmp_path / "s"
    experiment.write_text(good)
    code, told, err = in_process(capsys, monkeypatch, "sweep", experiment, "-o", out, "--dry-run")
    assert code == 0 and "measured when it begins" in told, err
    experiment.write_text(good.replace('"texts"', '"none"'))
    refused(in_process(capsys, monkeypatch, "sweep", experiment, "-o", out), "none")
    assert not out.exists()
