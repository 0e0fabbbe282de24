"""The wheel: everything of the package is in it, and what a newcomer starts with runs from it, far from the sources."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from mue.kernels import build
from support.paths import ROOT
from support.plan_file import PLAN

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SWEEP = """
base = { width = 16, ffn = 16, layers = 1, head_dim = 16, sequence = 16, training = { batch = 64, steps = 4 } }
data = { source = "stdlib" }
sweep = { lr = [0.01, 0.02], weight_decay = [0.1], init_std = [0.1], runner = "processes" }
"""
# The demo's own runs are minutes; these are the same, of four steps each, from a grid of three.
SHORT = ("base.training.steps=4", "target.training.steps=4", "base.training.batch=512", "target.training.batch=512",
         "sweep.lr=[0.004, 0.008, 0.016]", "sweep.init_std=[0.1]", "run.eval_sequences=4")  # fmt: skip


def packaged() -> list[str]:
    """The package's files as git has them, those that are new among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/mue"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in told.split() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in ``build/`` would be packed as well."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git here to say which files are the package's")
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*packaged(), "pyproject.toml", "README.md", "LICENSE"):
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "copy")]
    subprocess.run(build, check=True)
    [made] = folder.glob("*.whl")
    return made


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    """``mue demo`` of a wheel ended in "No such file": its TOML lay beside the code and was not packed."""
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mue/")}
    assert found == {name.removeprefix("src/") for name in packaged()}
    assert {Path(name).suffix for name in found} >= {".py", ".toml", ".html", ".cpp", ".h", ".typed"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel in it, which borrows what this one has installed."""
    place = tmp_path_factory.mktemp("elsewhere") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    [site] = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # its packages, and not what its own .pth name
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(place / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    return place / "bin"


def run(installed: Path, program: str, *arguments: object, cwd: Path) -> str:
    """What a program of the environment prints, started in another folder and without a word of where the sources are."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MUE_CACHE": str(cwd / "cache"), "COLUMNS": "200"}
    command = [str(installed / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_it_plans(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "python", "-c", "import mue; print(mue.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)  # and not the sources' own
    (tmp_path / "plan.toml").write_text(PLAN)
    assert "expert_down" in run(installed, "mue", "plan", "plan.toml", cwd=tmp_path)
    assert run(installed, "mue", "--version", cwd=tmp_path).startswith("mue 0.")


@pytest.mark.slow
def test_it_runs_the_demo_and_a_sweep(installed: Path, tmp_path: Path) -> None:
    told = run(installed, "mue", "demo", "-o", "demo", *(x for s in SHORT for x in ("--set", s)), cwd=tmp_path)
    assert "The report: demo/report.html" in told and (tmp_path / "demo" / "report.html").exists()
    (tmp_path / "sweep.toml").write_text(SWEEP)
    run(installed, "mue", "sweep", "sweep.toml", "-o", "swept", "-w", "2", cwd=tmp_path)
    assert (tmp_path / "swept" / "report.html").exists()
    lr = json.loads((tmp_path / "swept" / "result.json").read_text())["tuned"]["lr"]
    assert 0.01 <= round(lr, 6) <= 0.02


@pytest.mark.slow
def test_it_builds_the_kernel(installed: Path, tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    told = run(installed, "mue", "doctor", "--build", "--seconds", "0.2", cwd=tmp_path)
    assert f"native kernel: {tmp_path}/cache" in told


def test_extras_have_what_is_promised() -> None:
    """What a message or a page says to install is there, and ``hf`` is enough for transformers' Trainer."""
    named = set()
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        named |= set(re.findall(r"mue\[([\w,]+)\]", path.read_text(encoding="utf-8")))
    assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS)
    from mue.lab.sweep.metric_sinks import KINDS

    assert {"lab", "hf", "cluster", *KINDS} <= set(EXTRAS)
    assert any(line.startswith("accelerate") for line in EXTRAS["hf"])
