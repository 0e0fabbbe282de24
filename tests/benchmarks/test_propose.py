"""Ten models of others' code: nothing is decided wrongly, docs/results/propose.json says so, and docs/layouts.md quotes it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mue.layouts.propose import propose
from other_models.models import MODELS, NotHereError, built
from propose import expected, measured
from support.paths import ROOT

FILE = json.loads((ROOT / "docs" / "results" / "propose.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")


def line(name: str, found: dict[str, Any]) -> str:
    """A model's line of the page's table."""
    numbers = (found["tensors"], found["right"], found["decided"], found["wrong_without_mark"])
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def test_the_table_says_what_the_file_says() -> None:
    lines = [line(name, found) for name, found in FILE["models"].items()] + [line("all", FILE["total"])]
    table = re.findall(r"^\| .* \| \d+ \| \d+ \| \d+ \| \d+ \|$", PAGE, re.MULTILINE)
    assert table == lines
    assert list(FILE["models"]) == list(MODELS)  # none was replaced or left out


def test_the_goal_is_reached() -> None:
    assert FILE["total"]["right"] >= 0.95 * FILE["total"]["tensors"] and FILE["total"]["wrong_without_mark"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_decided_wrongly(name: str) -> None:
    try:
        model = built(name)
    except NotHereError as missing:
        pytest.skip(f"{name}: {missing}")
    table = expected(name)
    found = measured(propose(model), table)
    assert found["wrong_without_mark"] == 0, found["misses"]
    assert found["right"] >= 0.95 * found["tensors"], found["misses"]
    # the control: another expectation of what was decided is seen
    wrong = dict.fromkeys(table, "unplanned |")
    assert measured(propose(model), wrong)["wrong_without_mark"] == found["decided"]
