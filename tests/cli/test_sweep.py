"""``mue sweep``: run, gone on with, widened, interrupted; its report, and a plan from what it tuned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mue.lab.data.spec import open_corpus
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.tuned import tuned_of
from mue.plan.toml import read_toml
from support.command_line import in_process, refused, run


def test_bad_data(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, out = experiment.read_text(), tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "short.txt").write_text("too short for one sequence")
    for name, words in {
        "missing.txt": ("missing.txt",),
        "empty.txt": ("empty",),
        "binary.txt": ("binary.txt",),
        "short.txt": ("short",),
    }.items():
        experiment.write_text(good.replace('"texts"', f'"{name}"'))
        refused(in_process(capsys, monkeypatch, "sweep", experiment, "--out", out), *words)
        assert not out.exists()


def test_sweep_report_and_plan_from_it(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*arguments: object) -> tuple[int, str, str]:
        return in_process(capsys, monkeypatch, *arguments)

    out = tmp_path / "swept"
    done = run("sweep", experiment, "--out", out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "sweep.png").exists()
    results = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
    assert len(results) == 6
    again = run("sweep", experiment, "--out", out, "--workers", 2)
    assert "done before" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")} == results

    tuned = tuned_of(out).tuned
    plan_file = tmp_path / "target.toml"
    plan_file.write_text(
        "[base]\nwidth = 32\nffn = 32\nlayers = 2\nhead_dim = 16\n[target]\nmoe = '8e2a'\nwidth = 64\nexpert = 32\nlayers = 2\nhead_dim = 16\n"
    )
    _, planned, _ = here("plan", plan_file, "--json", "--tuned", out)
    assert json.loads(planned)["roles"]["embedding"]["lr"] == tuned.lr

    (out / "optuna.db").unlink()  # the index is not the truth
    for old, new, word in (("width = 32", "width = 64", "width"), ("layers = 2", "layers = 3", "layers")):
        plan_file.write_text(plan_file.read_text().replace(old, new, 1))
        refused(here("plan", plan_file, "--tuned", out), "another base", word)
        plan_file.write_text(plan_file.read_text().replace(new, old, 1))
    plan_file.write_text(plan_file.read_text() + "[tuned]\nclip = 1.0\n")
    refused(here("plan", plan_file, "--tuned", out), "[tuned]")
    rebuilt = run("sweep", experiment, "--out", out)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")} == results

    experiment.write_text(experiment.read_text().replace("steps = 40", "steps = 50"))
    refused(here("sweep", experiment, "--out", out), "another experiment", "training")
    experiment.write_text(experiment.read_text().replace("steps = 50", "steps = 40").replace("0.032]", "0.032, 0.064]"))
    wider = run("sweep", experiment, "--out", out)
    assert wider.returncode == 0, wider.stderr
    assert len(list(out.glob("runs/*/result.json"))) == 8


def test_another_grid_in_a_shared_storage_needs_a_name(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, shared = sweep_from(read_toml(experiment), tmp_path), f"sqlite:///{tmp_path / 'shared.db'}"
    first = SweepState.start(tmp_path / "first", spec, open_corpus(spec.source), shared)
    first.ask(first.open_trials(), first)
    experiment.write_text(experiment.read_text().replace("0.032]", "0.5]"))
    out = tmp_path / "second"
    refused(
        in_process(capsys, monkeypatch, "sweep", experiment, "-o", out, "--storage", shared),
        "lr differ",
        "--study NAME",
    )
    assert not out.exists()


def test_a_sampler_goes_on_and_ends(experiment: Path, tmp_path: Path) -> None:
    """Seeds between the listed ones are never run, finished runs never again, and few points do not make it spin."""
    experiment.write_text(
        experiment.read_text()
        .replace("lr = [0.002, 0.008, 0.032]", "lr = [0.008]\nseeds = [0, 9]\nsampler = 'random'\ntrials = 3")
        .replace("init_std = [0.05, 0.1]", "init_std = [0.1]")
        .replace("steps = 40", "steps = 10")
    )
    out = tmp_path / "random"
    for _ in range(2):
        done = run("sweep", experiment, "--out", out, "--keep-weights")
        assert done.returncode == 0, done.stderr
        seeds = {json.loads(p.read_text())["seed"] for p in out.glob("runs/*/result.json")}
        assert seeds <= {0, 9}
        found = sorted(p.stat().st_mtime_ns for p in out.glob("runs/*/result.json"))
        assert 1 <= len(found) <= 2
    assert len(found) == len(list(out.glob("runs/*/result.json"))) == len(list(out.glob("runs/*/model.safetensors")))


def test_an_interrupt_says_how_to_go_on(experiment: Path) -> None:
    import signal

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "mue", "sweep", str(experiment), "-o", str(experiment.parent / "out"), "-w", "1"]
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - tests in the background ignore it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heeding}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline().startswith("data:")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the same command again to go on" in err and "Traceback" not in err


def test_a_dry_run_on_images_says_what_it_would_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    (tmp_path / "images.toml").write_text(
        "data = {source = 'digits'}\nrun = {task = 'diffusion'}\n"
        "base = {width = 32, ffn = 32, layers = 1, head_dim = 16, image = {size = 8, channels = 1, patch = 2, classes = 10},"
        " training = {batch = 64, steps = 5}}\nsweep = {lr = [0.01], weight_decay = [0.0], init_std = [0.05]}\n"
    )
    code, out, err = in_process(
        capsys, monkeypatch, "sweep", tmp_path / "images.toml", "-o", tmp_path / "s", "--dry-run"
    )
    assert code == 0, err
    assert "runs of 5 steps" in out
    assert "tokens are kept" not in out and not (tmp_path / "s").exists()
