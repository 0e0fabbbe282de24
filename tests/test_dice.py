"""Dice of the tests: printed, rolled again by the number that was printed, new in every run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.dice import VARIABLE, dice, replay
from support.paths import ROOT

ROLLS = """
from hypothesis import given, strategies as st
from support.dice import dice

@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_drawn(one, other):
    assert one < 1000 or other < 1000

def test_rolled():
    raise AssertionError(f"rolled {dice('it').random()}")
"""


def failures(folder: Path, **environment: str) -> str:
    """What a run of two tests that always fail prints."""
    (folder / "test_rolls.py").write_text(ROLLS)
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "support.dice", str(folder)]
    found = {k: v for k, v in os.environ.items() if k != VARIABLE and not k.startswith("PYTEST")}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**found, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    return done.stdout


def thrown(output: str) -> list[str]:
    """The numbers that both tests drew."""
    found = re.findall(r"rolled [\d.]+|(?:one|other)=\d+", output)
    assert len(found) >= 3, output
    return found


def test_the_printed_number_rolls_the_same_dice(tmp_path: Path) -> None:
    first = failures(tmp_path)
    (line,) = set(re.findall(rf"{VARIABLE}=(\d+)", first))
    assert thrown(failures(tmp_path, **{VARIABLE: line})) == thrown(first)
    assert thrown(failures(tmp_path, **{VARIABLE: str(int(line) + 1)})) != thrown(first)  # negative control


def test_names_have_dice_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(VARIABLE, "7")
    rolls = [dice(name).random() for name in ("one", "two", "one")]
    assert rolls[0] == rolls[2] != rolls[1]
    assert capsys.readouterr().out.splitlines() == [replay()] * 3
