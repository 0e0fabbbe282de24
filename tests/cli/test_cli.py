"""The command line: what works, and that every mistake is one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mue
from mue.lab.sweep.sweep import tuned_of
from support.command_line import in_process, refused
from support.plan_file import PLAN


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "mue", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=240, check=False)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


@pytest.mark.parametrize("command", ["demo", "plan", "sweep", "train", "report"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = in_process(capsys, monkeypatch, command, "--help")
    assert code == 0
    assert len(out.splitlines()) > 8
    if command in ("plan", "sweep"):
        assert "[base]" in out


def test_plan_prints_and_saves(plan_file: Path) -> None:
    shown = run("plan", plan_file)
    assert shown.returncode == 0, shown.stderr
    for role in ("expert_down", "router", "head", "ρ_d^-1"):
        assert role in shown.stdout
    result = run("plan", plan_file, "--json", "--save", plan_file.with_name("plan.json"))
    data = json.loads(result.stdout)
    assert data["roles"]["expert_down"]["init_std"] == pytest.approx(0.0106066, rel=1e-5)
    assert mue.Plan.load(plan_file.with_name("plan.json")).hash == data["hash"]
    other = json.loads(run("plan", plan_file, "--json", "--rule", "standard").stdout)
    assert other["roles"]["expert_down"]["init_std"] == 0.01


def test_printed_width_decides_the_columns(plan_file: Path) -> None:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from mue.cli import main; main()", "plan", str(plan_file)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "ρ_d^-1" not in out
    assert "expert_down" in out


SPOILED = {
    "misspelt key": (("[base]\nwidth", "[base]\nwidht"), ("widht", "width")),
    "misspelt table": (("[tuned]", "[tunde]"), ("tunde", "tuned")),
    "a > N": (("128e8a1s", "8e16a"), ("16 active of 8",)),
    "groups": (("128e8a1s", "128e8a3g"), ("3 groups",)),
    "zero": (("lr = 1e-3", "lr = 0"), ("lr", "greater than 0")),
    "negative": (("width = 128", "width = -128"), ("width", "-128")),
    "nan": (("lr = 1e-3", "lr = nan"), ("lr", "finite")),
    "infinite": (("init_std = 0.01", "init_std = inf"), ("init_std", "finite")),
    "heads": (("width = 1024", "width = 1000"), ("1000", "head_dim")),
    "betas": (("steps = 100000", "steps = 1000"), ("beta1", "2,501 steps")),
    "one training": (("[target.training]\nbatch = 524288\nsteps = 100000\n", ""), ("base_training",)),
    "gates": (("layers = 8\n[target.training]", 'layers = 8\nrouter = "softmax"\nnormalize = false\n[target.training]'), ("measured",)),
    "rule": (('"complete-mue"', '"complete-mu"'), ("complete-mue",)),
    "not toml": (("[base]", "[base"), ("TOML",)),
    "rule of another type": (('"complete-mue"', '["mup"]'), ("unknown rule",)),
    "a number beyond reason": (("batch = 524288", "batch = 1" + "0" * 400), ("10^18",)),
    "text for a switch": (("expert = 1024", 'expert = 1024\nnormalize = "false"'), ("normalize", "true or false")),
    "one gate moment": (("expert = 1024", 'expert = 1024\ngates = "measured"\ngate_moments = 0.3'), ("gate_moments",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILED)
def test_bad_plan_files(
    fault: str, plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (old, new), words = SPOILED[fault]
    text = plan_file.read_text()
    assert old in text
    plan_file.write_text(text.replace(old, new, 1))
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--save", plan_file.with_name("out.json")), *words)
    assert not plan_file.with_name("out.json").exists()


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


def test_sweep_report_and_plan_from_it(experiment: Path, tmp_path: Path) -> None:
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
    planned = run("plan", plan_file, "--json", "--tuned", out)
    assert json.loads(planned.stdout)["roles"]["embedding"]["lr"] == tuned.lr

    (out / "optuna.db").unlink()  # the index is not the truth
    for old, new, word in (("width = 32", "width = 64", "width"), ("layers = 2", "layers = 3", "layers")):
        plan_file.write_text(plan_file.read_text().replace(old, new, 1))
        other = run("plan", plan_file, "--tuned", out)
        refused((other.returncode, other.stdout, other.stderr), "another base", word)
        plan_file.write_text(plan_file.read_text().replace(new, old, 1))
    plan_file.write_text(plan_file.read_text() + "[tuned]\nclip = 1.0\n")
    other = run("plan", plan_file, "--tuned", out)
    refused((other.returncode, other.stdout, other.stderr), "[tuned]")
    rebuilt = run("sweep", experiment, "--out", out)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")} == results

    experiment.write_text(experiment.read_text().replace("steps = 40", "steps = 50"))
    other = run("sweep", experiment, "--out", out)
    refused((other.returncode, other.stdout, other.stderr), "another experiment", "training")
    experiment.write_text(experiment.read_text().replace("steps = 50", "steps = 40").replace("0.032]", "0.032, 0.064]"))
    wider = run("sweep", experiment, "--out", out)
    assert wider.returncode == 0, wider.stderr
    assert len(list(out.glob("runs/*/result.json"))) == 8


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
        done = run("sweep", experiment, "--out", out)
        assert done.returncode == 0, done.stderr
        seeds = {json.loads(p.read_text())["seed"] for p in out.glob("runs/*/result.json")}
        assert seeds <= {0, 9}
        found = sorted(p.stat().st_mtime_ns for p in out.glob("runs/*/result.json"))
        assert 1 <= len(found) <= 2
    assert len(found) == len(list(out.glob("runs/*/result.json")))


def test_train_and_report(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(
        experiment.read_text().partition("[sweep]")[0] + "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n"
    )
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


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(in_process(capsys, monkeypatch, "report", tmp_path), "neither")


def test_tuned_needs_a_finished_sweep(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--tuned", tmp_path), "tuned")


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
