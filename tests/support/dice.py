"""Dice: what falls at random in the tests falls from one number, which every run prints and ``MUE_DICE`` gives back.

The number is new in every run, so that kills, freezes and drawn examples are not always the same ones. A plugin of pytest
(``tests/conftest.py`` names it): hypothesis draws from the number, too.
"""

from __future__ import annotations

import os
import random
import time

import pytest

VARIABLE = "MUE_DICE"


def number() -> int:
    """The number that all dice of this run fall from; workers and processes of tests inherit it."""
    return int(os.environ.setdefault(VARIABLE, str(time.time_ns() % 2**32)))


def replay() -> str:
    """How to have the same dice again."""
    return f"dice: {VARIABLE}={number()} before the same command rolls them again"


def dice(name: str) -> random.Random:
    """Dice of its own for a test: the same whatever ran before it."""
    print(replay())
    return random.Random(f"{number()} {name}")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its seed, and before workers begin
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(number())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(replay())
