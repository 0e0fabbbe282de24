"""``mue train``: the files it leaves, their report, and what its options change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mue
from support.command_line import in_process, refused, run

TUNED = "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n"


def test_train_and_report(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(experiment.read_text() + TUNED)
    out = tmp_path / "trained"
    done = run("train", experiment, "--out", out)
    assert done.returncode == 0, done.stderr
    folder = next(out.glob("runs/*"))
    for name in ("model.safetensors", "metrics.jsonl", "report.html", "plan.json", "result.json"):
        assert (folder / name).exists(), name
    mue.Plan.load(folder / "plan.json")
    (folder / "report.html").unlink()
    assert run("report", folder).returncode == 0
    assert (folder / "report.html").exists()
    assert "threads: 1, as OMP_NUM_THREADS says" in done.stdout


def test_options_are_the_keys_that_they_stand_for(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = '[target]\nmoe = "4e2a"\nwidth = 64\nexpert = 32\nlayers = 2\nhead_dim = 16\nsequence = 32\n'
    experiment.write_text(experiment.read_text() + TUNED + target + "[target.training]\nbatch = 128\nsteps = 5\n")

    def trained(*more: str) -> str:
        """The key of the run, of which there is one in a folder."""
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        code, _, err = in_process(
            capsys, monkeypatch, "train", experiment, "-o", out, "--set", "base.training.steps=5", *more
        )
        assert code == 0, err
        [folder] = out.glob("runs/*")
        config = json.loads((folder / "config.json").read_text())
        said.append((config["plan"]["rule"], config["settings"]["seed"], (out / "tensorboard").exists()))
        return folder.name

    said: list[tuple[str, int, bool]] = []
    pytest.importorskip("tensorboard")
    given = trained("--rule", "standard", "--seed", "3", "--device", "cpu", "--log", "tensorboard")
    assert trained("--set", "rule='standard'", "--set", "run.seed=3") == given
    assert said == [("standard", 3, True), ("standard", 3, False)]


def test_what_cannot_be_is_said_before_anything_is_made(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(experiment.read_text() + TUNED)
    for options, words in {
        ("--device", "cuda:99"): ("no device 'cuda:99'",),
        ("--device", "gpu"): ("no device 'gpu'",),
        ("--device", "meta"): ("meta", "shapes only"),
        ("--seed", "-1"): ("seed must be a whole number",),
        ("--rule", "standart"): ("standart", "standard"),
        ("--log", "tensorbord"): ("--log takes tensorboard or wandb",),
        ("--seed", "1", "--set", "run.seed=1"): ("set the same value",),
    }.items():
        refused(in_process(capsys, monkeypatch, "train", experiment, "-o", tmp_path / "out", *options), *words)
        assert not (tmp_path / "out").exists()
