"""``kill -9`` at random moments: nothing is lost, nothing is repeated, every byte of metrics is the same.

Three kills each by default, ten under ``make slow``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.dice import dice

KILLS = [3, pytest.param(10, marks=pytest.mark.slow)]

TRAIN = """
import sys
from pathlib import Path
from mue.plan.toml import read_toml
from mue.lab.data.spec import data_source, describe_data, open_data
from mue.lab.train.spec import settings_from, train_plan
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from mue.lab.train.task import task_of

file, out = Path(sys.argv[1]), Path(sys.argv[2])
data = read_toml(file)
settings = settings_from(data)
source = data_source(data, file.parent, task_of(settings).reads)
corpus = open_data(source)
run = Run(train_plan(data, None), settings, describe_data(source, corpus))
print("ready", flush=True)
result = train(run, Store(out), corpus, checkpoint_seconds=0.05, keep_weights=True)
print("done", run.key, flush=True)
"""

SWEEP = """
import sys
from pathlib import Path
from mue.plan.toml import read_toml
from mue.lab.data.spec import open_corpus
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.sweep import run_sweep

file, out = Path(sys.argv[1]), Path(sys.argv[2])
spec = sweep_from(read_toml(file), file.parent)
corpus = open_corpus(spec.source)
print("ready", flush=True)
swept = run_sweep(spec, out, corpus, workers=2, checkpoint_seconds=0.05)
print("done", swept.runs, flush=True)
"""

TARGET = """
[tuned]
lr = 0.008
weight_decay = 0.1
init_std = 0.1
[target]
moe = "8e2a1s"
width = 64
expert = 32
layers = 2
head_dim = 16
sequence = 32
[target.training]
batch = 128
steps = 600
"""


IMAGES = """
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
image = {size = 8, channels = 1, patch = 2, classes = 10}
[base.training]
batch = 128
steps = 600
[data]
source = "digits"
[run]
task = "diffusion"
ema = [0.9, 0.99]
"""


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise AssertionError(process.communicate()[1])
    return process


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def metrics(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("runs/*/metrics.jsonl"))}


def kill_until_done(script: str, file: Path, out: Path, kills: int, wait: tuple[float, float]) -> tuple[int, list[str]]:
    """Start, kill at a random moment, start again: (kills that hit a live process, faults seen on the way)."""
    rolled, hits, faults = dice(f"{kills} kills"), 0, []
    finished: dict[Path, int] = {}
    for _ in range(kills):
        process = start(script, file, out)
        time.sleep(rolled.uniform(*wait))
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in out.glob("runs/*/result.json"):
            stamp = path.stat().st_mtime_ns
            if finished.setdefault(path, stamp) != stamp:
                faults.append(f"{path} was written twice: a finished run ran again")
    finish(start(script, file, out))
    faults += [f"{p} was written twice" for p, stamp in finished.items() if p.stat().st_mtime_ns != stamp]
    return hits, faults


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", KILLS)
def test_a_training_run_survives_kills(experiment: Path, tmp_path: Path, kills: int) -> None:
    experiment.write_text(experiment.read_text().partition("[sweep]")[0] + TARGET)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(TRAIN, experiment, whole))
    hits, faults = kill_until_done(TRAIN, experiment, broken, kills, (0.1, 1.2))
    assert hits >= 2, "the kills came after the end: the test tested nothing"
    assert faults == []
    assert metrics(whole) == metrics(broken)
    weights = [next(out.glob("runs/*/model.safetensors")).read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]
    assert not list(broken.glob("runs/*/checkpoint.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_images_survives_kills(tmp_path: Path) -> None:
    """With its averages: every file of weights has the same bytes."""
    pytest.importorskip("sklearn")
    file, whole, broken = tmp_path / "images.toml", tmp_path / "whole", tmp_path / "broken"
    file.write_text(
        IMAGES + TARGET.replace("sequence = 32", "image = {size = 8, channels = 1, patch = 2, classes = 10}")
    )
    finish(start(TRAIN, file, whole))
    hits, faults = kill_until_done(TRAIN, file, broken, 5, (0.1, 1.5))
    assert hits >= 2 and faults == []
    assert metrics(whole) == metrics(broken)
    names = ("model", "ema-0.9", "ema-0.99")
    weights = [[next(out.glob(f"runs/*/{n}.safetensors")).read_bytes() for n in names] for out in (whole, broken)]
    assert weights[0] == weights[1] and len(set(weights[0])) == 3


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", KILLS)
def test_a_sweep_survives_kills(experiment: Path, tmp_path: Path, kills: int) -> None:
    experiment.write_text(experiment.read_text().replace("steps = 40", "steps = 120"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(SWEEP, experiment, whole))
    hits, faults = kill_until_done(SWEEP, experiment, broken, kills, (0.5, 5.0))
    assert hits >= 2, "the kills came after the end: the test tested nothing"
    assert faults == []
    assert len(metrics(whole)) == 6
    assert metrics(whole) == metrics(broken)
    results = [(out / "result.json").read_text() for out in (whole, broken)]
    assert results[0] == results[1]


def test_control_a_resume_from_the_wrong_step_is_seen(experiment: Path, tmp_path: Path) -> None:
    """The comparison can fail: metrics with one repeated row are not the same bytes."""
    experiment.write_text(experiment.read_text().partition("[sweep]")[0] + TARGET.replace("600", "20"))
    finish(start(TRAIN, experiment, tmp_path / "out"))
    rows = metrics(tmp_path / "out")
    path = next((tmp_path / "out").glob("runs/*/metrics.jsonl"))
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])
    assert metrics(tmp_path / "out") != rows


def test_workers_die_with_their_parent(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(experiment.read_text().replace("steps = 40", "steps = 100000"))
    process = start(SWEEP, experiment, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
