"""docs/architecture.md: every "how to add" is complete and short, runs as it stands, and its table has every folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
KINDS = ("rule", "law", "router", "model family", "training stack", "check", "sampler", "task")
EXAMPLES = dict(re.findall(r"^### An? ([\w ]+?)(?: of \w+)? \(`.*?^```python\n(.*?)^```", PAGE, flags=re.S | re.M))


def test_there_is_an_example_of_everything_one_may_add() -> None:
    assert set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_short_and_runs_as_it_stands(kind: str, tmp_path: Path) -> None:
    code = EXAMPLES[kind]
    lines = [line for line in code.splitlines() if line.strip()]
    assert 10 <= len(lines) <= 25, f"{len(lines)} lines"
    assert ".register(" in code or re.search(
        r"^@(router|check_of|family)\(", code, flags=re.M
    )  # it registers something
    assert "steps = 10" in code or "steps=10" in code or "range(10)" in code  # and trains ten steps
    (tmp_path / "text.txt").write_text("Nothing is imported upward; by name one thing is. " * 200)
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_router_by_its_entry_point_is_known_to_every_command(tmp_path: Path) -> None:
    """The page's class in a package of one's own, named as the page says: plan files and the command line find it."""
    site = tmp_path / "site"
    (site / "my_package").mkdir(parents=True)
    code = EXAMPLES["router"].partition("\nbase = ")[0]
    assert len(code.splitlines()) <= 20
    (site / "my_package" / "my_module.py").write_text(code)
    (points,) = re.findall(r"^```toml\n(\[project\.entry-points.*?)^```", PAGE, flags=re.S | re.M)
    ((group, named),) = tomllib.loads(points)["project"]["entry-points"].items()
    (site / "mine-1.dist-info").mkdir()
    (site / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    listed = "\n".join([f"[{group}]", *(f"{name} = {module}" for name, module in named.items())])
    (site / "mine-1.dist-info" / "entry_points.txt").write_text(listed)
    common = "head_dim = 16\nlayers = 2\n"
    (tmp_path / "plan.toml").write_text(
        f"[base]\nwidth = 32\nffn = 32\n{common}[tuned]\nlr = 8e-3\nweight_decay = 0.1\ninit_std = 0.1\n"
        f'[target]\nmoe = "8e2a"\nwidth = 64\nexpert = 32\n{common}router = {{ name = "first", skip = 3 }}\n'
    )
    said = []
    for paths in ([str(site), *sys.path], sys.path):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "mue", "plan", "plan.toml"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
        said.append((done.returncode, done.stderr))
    assert said[0][0] == 0, said
    assert said[1][0] == 2 and "unknown router 'first'" in said[1][1]  # the control: without the package


def test_the_picture_has_every_folder() -> None:
    source = ROOT / "src" / "mue"
    written = re.findall(
        r">([^<]+)</text>", (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    )
    words = set(re.findall(r"\w+", " ".join(written)))
    folders = {p.parent.name for where in (source, source / "lab") for p in where.glob("*/__init__.py")}
    assert folders <= words and len(folders) > 20
    assert not {"planning", "observe", "subjects"} & words  # negative control: words that nobody wrote are not there


def test_the_table_has_every_folder_and_no_other() -> None:
    table = PAGE.split("## Folders")[1].split("**Imports point down.**")[0]
    named = {
        name.removesuffix(".py")
        for row in table.splitlines()
        for name in re.findall(r"`(\w+(?:\.py)?)`", row.split("|")[1] if row.startswith("| `") else "")
    }
    there = {p.parent.name for p in (ROOT / "src" / "mue").glob("*/__init__.py")} | {"api"}
    assert named == there and len(there) > 10
