"""docs/files.md and docs/layouts.md say all that there is: every key, every file of a run, every role and axis.

``MUE_WRITE_KEYS=1`` writes the tables of keys again.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mue.lab.data import load_corpus
from mue.lab.schema import schema
from mue.lab.train import run as runs
from mue.lab.train.run import Store
from mue.lab.train.session import train
from mue.layouts.layout import AXES, LAYOUT_ROLES
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from support.pages import fences
from support.paths import ROOT
from support.small_run import moe_run

PATH = ROOT / "docs" / "files.md"
PAGE = PATH.read_text(encoding="utf-8")
LAYOUTS = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
MARKED = re.compile(r"(<!-- keys: ([\w.]+) -->\n).*?(<!-- /keys -->)", flags=re.S)


def keys(table: str) -> dict[str, Any]:
    found: dict[str, Any] = schema("train")
    for part in table.split("."):
        found = found["properties"][part]
    return found["properties"]


def written(page: str) -> str:
    """The page with every marked table made anew from the schema."""

    def made(match: re.Match[str]) -> str:
        rows = [f"| `{key}` | {told['description']} |" for key, told in keys(match[2]).items()]
        return "\n".join([match[1] + "| key | is |", "|---|---|", *rows, match[3]])

    return MARKED.sub(made, page)


def first_cells(text: str, heading: str, column: int = 0) -> set[str]:
    """What stands in backticks in a column of the tables below a heading, up to the next one."""
    part = re.split(r"^#+ ", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.M)[0]
    lines = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")]
    return {word for cells in lines for word in re.findall(r"`([^`]+)`", cells[column])}


def test_every_key_of_a_file_stands_there() -> None:
    if os.environ.get("MUE_WRITE_KEYS"):
        PATH.write_text(written(PAGE), encoding="utf-8")
        return
    assert written(PAGE) == PAGE
    tables = {match[2] for match in MARKED.finditer(PAGE)}
    assert {name.rpartition(".")[0] or name for name in tables} >= set(schema("train")["properties"]) - {
        "rule",
        "options",
    } - {"base"}


def test_the_example_plans_plan() -> None:
    plain, full = (plan_of(plan_inputs(tomllib.loads(code))) for _, code in fences(PAGE, "toml"))
    assert plain.roles["expert_down"].values.init_std == pytest.approx(0.0106066, rel=1e-5)
    assert full.output_multiplier is None  # its blocks differ
    assert full.roles["embedding"].values.lr == 3e-3


def test_a_runs_files_and_fields_are_those_that_a_run_leaves(texts: Path, tmp_path: Path) -> None:
    run, store = moe_run(load_corpus(texts, cache=tmp_path / "cache"), steps=4), Store(tmp_path)
    result = train(run, store, load_corpus(texts, cache=tmp_path / "cache"), keep_weights=True)
    said = first_cells(PAGE, "## A run's folder")
    files = {value for name, value in vars(runs).items() if name.endswith("_FILE")}
    assert (
        files <= said
        and {p.name for p in store.folder(run.key).iterdir() if not p.name.startswith(".")} - {"lock"} <= said
    )
    assert {key for row in store.metrics(run.key) for key in row} <= said
    assert set(result) <= said, set(result) - said
    assert json.loads((store.folder(run.key) / "result.json").read_text()).keys() <= said


def test_every_role_and_axis_stands_there() -> None:
    roles, _, axes = LAYOUTS.partition("## Axes")
    assert set(re.findall(r"`(\w+)`", roles)) >= set(LAYOUT_ROLES)
    assert set(re.findall(r"[`\"]([\w*]+)[`\"]", axes)) >= set(AXES)
