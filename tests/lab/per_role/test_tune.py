"""``mue tune-roles`` on real runs: its folder, going on where it stopped, and what a plan makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import mue
from conftest import EXPERIMENT
from mue.lab.data import Corpus
from mue.lab.data.spec import open_corpus
from mue.lab.per_role.report import roles_report, roles_sections
from mue.lab.per_role.tune import RolesSpec, roles_from, tune_roles
from mue.lab.runners.listener import RunListener
from mue.lab.sweep.tuned import tuned_of
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from mue.plan.toml import read_toml, tuned_from

FILE = (
    EXPERIMENT.split("[sweep]")[0]
    .replace("steps = 40", "steps = 4")
    .replace("eval_every = 10\neval_sequences = 8\n", "eval_sequences = 4\n")
    + """
[tuned]
lr = 0.002
weight_decay = 0.1
init_std = 0.1
[roles]
numbers = ["lr"]
thirds = false
rounds = 1
confirm = 3
"""
)


class Counted(RunListener):
    """What a search trains, batch by batch."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.fresh: set[str] = set()

    @contextmanager
    def __call__(self, title: str, runs: Sequence[Run]) -> Iterator[Counted]:
        self.titles.append(title)
        yield self

    def moved(self, run: Run, step: int, loss: float) -> None:
        self.fresh.add(run.key)


@cache
def _opened(source: str) -> Corpus:
    return open_corpus(json.loads(source))


def _corpus(run: Run) -> Corpus:
    return _opened(json.dumps(run.data["source"]))


def spec_in(folder: Path) -> RolesSpec:
    return roles_from(read_toml(folder / "roles.toml"), folder)


@pytest.fixture(scope="module", autouse=True)
def trained_here() -> Iterator[None]:
    """Runs of a second in this process: starting workers costs more. (The killed search below has real ones.)"""

    def run_all(runs: Sequence[Run], store: Store, *, listener: RunListener, **_: Any) -> dict[str, Any]:
        results = {}
        for run in runs:
            progress = partial(listener.moved, run)
            results[run.key] = train(run, store, _corpus(run), progress=progress)
            listener.ended(run, results[run.key], fresh=True)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mue.lab.per_role.tune.run_all", run_all)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A folder with ``roles.toml`` and its finished search in ``out``."""
    folder = tmp_path_factory.mktemp("roles")
    (folder / "texts").symlink_to(texts)
    (folder / "roles.toml").write_text(FILE)
    spec = spec_in(folder)
    tune_roles(spec, folder / "out", open_corpus(spec.source), Counted())
    return folder


def without_clock(path: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("git", "threads")}


def test_a_search_ends_in_tables_that_a_plan_reads(finished: Path) -> None:
    out = finished / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["runs"] == len(list((out / "runs").iterdir())) - 1  # one folder holds the lock
    assert (
        result["rounds"][0]["taken"] and result["confirmed"]["gain"]["gain"] > 0
    )  # such a small lr leaves much to gain
    assert {"low", "high", "gain", "times", "kept", "name", "seeds"} <= set(result["multipliers"][0])
    tuned = tuned_of(out).tuned
    assert bool(tuned.roles) == result["confirmed"]["holds"]
    assert tuned_from(read_toml(out / "tuned.toml")["tuned"]) == tuned
    target = mue.MoE.parse("4e2a", width=64, expert=16, layers=2, head_dim=16)
    plan = mue.transfer(tuned_of(out).base, target, tuned)
    assert tuned.roles, "so small a global lr leaves gains that are confirmed"
    for role in ("head", "embedding"):
        times = tuned.roles.get(role, {}).get("lr_times", 1.0)
        assert plan.roles[role].values.lr == pytest.approx(tuned.lr * times * plan.roles[role].factor.lr)
    page = roles_report(out).read_text()
    assert (
        "What each multiplier bought" in page
        and "one global value" in page
        and (out / "roles.png").stat().st_size > 5000
    )
    assert "in nats per token" in page and "nats," not in page and "nats (" not in page
    windows = {**result["identity"], "settings": {**result["identity"]["settings"], "task": "order"}}
    captions = " ".join(section.caption for section in roles_sections({**result, "identity": windows}))
    assert "in nats per window" in captions  # the task's own, whatever it is


def test_it_goes_on_where_it_stopped(finished: Path, tmp_path: Path) -> None:
    """Runs that are there are not run again; those that are missing are, and the result is the same."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    folder, spec = tmp_path / "copy", spec_in(tmp_path / "copy")
    corpus, before = open_corpus(spec.source), without_clock(folder / "out" / "result.json")
    runs = sorted(p for p in (folder / "out" / "runs").iterdir() if p.name != "roles")
    for path in (folder / "out" / "result.json", *runs[:3]):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    counted = Counted()
    tune_roles(spec, folder / "out", corpus, counted)
    assert without_clock(folder / "out" / "result.json") == before and len(counted.fresh) == 3
    other = (folder / "roles.toml").read_text().replace("lr = 0.002", "lr = 0.003")
    (folder / "roles.toml").write_text(other)
    with pytest.raises(ValueError, match=r"holds another search \(tuned differ\)"):
        tune_roles(spec_in(folder), folder / "out", corpus, counted)
    (folder / "out" / "roles.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        tune_roles(spec, folder / "out", corpus, counted)


BAD: list[tuple[str, str, str]] = [
    ("[tuned]\nlr = 0.002\nweight_decay = 0.1\ninit_std = 0.1\n", "", r"needs a \[tuned\] table"),
    ("init_std = 0.1", "init_std = 0.1\n[tuned.roles]\nhead = { lr_times = 2 }", "is what this search looks for"),
    ('numbers = ["lr"]', "number = 3", r"unknown key 'number' in \[roles\]; did you mean 'numbers'"),
    ("[base.training]\nbatch = 128\nsteps = 4\n", "", r"needs \[base.training\]"),
    ("[roles]", "[rols]", "did you mean 'roles'"),
    ("[base.training]", "[base.convention]\nattention_scale = 1.0\n[base.training]", "leave it out"),
    ("rounds = 1", "rounds = 0", "rounds must be"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in FILE
    (tmp_path / "bad.toml").write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        roles_from(read_toml(tmp_path / "bad.toml"), tmp_path)


def test_without_weight_decay_there_is_none_to_multiply(tmp_path: Path) -> None:
    (tmp_path / "roles.toml").write_text(
        FILE.replace("weight_decay = 0.1", "weight_decay = 0").replace('["lr"]', '["lr", "weight_decay"]')
    )
    assert spec_in(tmp_path).search.numbers == ("lr",)


@pytest.mark.slow
def test_killed_and_killed_again(tmp_path: Path, texts: Path) -> None:
    """``kill -9`` at four moments: the same result as the undisturbed search, to the bit. Both are the command's own processes:
    what is trained in the tests' process lies elsewhere in memory, and products may round otherwise there."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
        (folder / "texts").symlink_to(texts)
        (folder / "roles.toml").write_text(FILE)
    command = [
        sys.executable,
        "-c",
        "from mue.cli import main; main()",
        "tune-roles",
        "roles.toml",
        "-o",
        "out",
        "-w",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=undisturbed, env=environment, capture_output=True, check=True)
    runs = json.loads((undisturbed / "out" / "result.json").read_text())["runs"]
    for share in (0.1, 0.4, 0.6, 0.9):
        process = subprocess.Popen(command, cwd=killed, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("out/runs/*/result.json"))) < share * runs:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=killed, env=environment, capture_output=True, text=True, check=True)
    assert "report:" in done.stdout and Store(killed / "out").root.exists()
    mine, theirs = (without_clock(folder / "out" / "result.json") for folder in (killed, undisturbed))
    assert mine == theirs
