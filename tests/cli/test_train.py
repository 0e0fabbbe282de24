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


def test_a_run_without_weights_is_trained_again_and_keeps_them(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very run: its key, its loss. In the folder where it is finished nothing is trained again, and that is said."""
    experiment.write_text(experiment.read_text() + TUNED)
    bare, kept = tmp_path / "bare", tmp_path / "kept"
    short = ("--set", "base.training.steps=5")
    assert in_process(capsys, monkeypatch, "train", experiment, "-o", bare, "--no-keep-weights", *short)[0] == 0
    [folder] = bare.glob("runs/*")
    assert not (folder / "model.safetensors").exists()
    refused(in_process(capsys, monkeypatch, "train", folder, "-o", bare), "kept no weights", "another --out")
    refused(in_process(capsys, monkeypatch, "train", folder, "-o", kept, "--seed", "1"), "--seed", "another run")
    refused(in_process(capsys, monkeypatch, "train", bare, "-o", kept), "is no run")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"lr": 0.01', '"lr": 0.02'))
    refused(in_process(capsys, monkeypatch, "train", folder, "-o", kept), f"trained as run {folder.name}", "anew")
    (folder / "config.json").write_text(config)
    assert not kept.exists()
    assert in_process(capsys, monkeypatch, "train", folder, "-o", kept)[0] == 0
    again = kept / "runs" / folder.name
    assert (again / "model.safetensors").exists()
    losses = [json.loads((f / "result.json").read_text())["val_loss"] for f in (folder, again)]
    assert losses[0] == losses[1]
    (tmp_path / "texts").unlink()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("another text\n" * 200)
    refused(in_process(capsys, monkeypatch, "train", folder, "-o", tmp_path / "new"), "the data", "have changed")
    assert not (tmp_path / "new").exists()
