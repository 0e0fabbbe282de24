"""``mue schema``: every file that we ship or show is valid by it, and what the readers refuse as a key it refuses."""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.lab.schema import KINDS, schema
from mue.lab.sweep.spec import sweep_from
from mue.plan.key_words import KEY_WORDS, TABLE_WORDS
from mue.plan.starter import Starter
from mue.plan.toml import plan_inputs
from support.json_schema import faults
from support.pages import fences, name, pages
from support.paths import ROOT

BASE, TARGET = (
    mue.Dense(64, 96, 3, head_dim=16),
    mue.MoE.parse("8e2a1s", width=64, expert=24, layers=2, router="softmax"),
)
RUN, TUNED = mue.Training(4096, 100), {"lr": 3e-3, "weight_decay": 0.1, "init_std": 0.05}
of = cache(schema)


def kind_of(data: dict[str, Any]) -> str:
    """Which file a page's or a folder's TOML is; empty for a part of one."""
    if {"approaches", "axes", "base"} <= set(data):
        return "study"
    if {"base", "sweep", "data"} <= set(data):
        return "sweep"
    if {"base", "target", "tuned"} <= set(data):
        return "plan"
    return "train" if {"base", "tuned", "data"} <= set(data) else ""


def shipped() -> dict[str, dict[str, Any]]:
    """Whole files: of the library, of benchmarks, and of the fences of all pages."""
    found = {}
    for folder in ("src", "benchmarks/studies", "benchmarks/router_claims"):
        for path in (ROOT / folder).rglob("*.toml"):
            found[path.relative_to(ROOT).as_posix()] = tomllib.loads(path.read_text(encoding="utf-8"))
    for page in pages():
        for i, (_, code) in enumerate(fences(page.read_text(encoding="utf-8"), "toml")):
            found[f"{name(page)} {i}"] = tomllib.loads(code)
    return {where: data for where, data in found.items() if kind_of(data)}


def test_every_file_that_is_shipped_or_shown_is_valid() -> None:
    files = shipped()
    assert {kind_of(data) for data in files.values()} >= {"plan", "study"} and len(files) >= 6
    for where, data in files.items():
        assert faults(data, of(kind_of(data))) == [], where


@pytest.mark.parametrize("kind", ["plan", "sweep", "train"])
def test_what_init_writes_is_valid(kind: str) -> None:
    tuned = {} if kind == "sweep" else TUNED
    text = Starter(kind, BASE, TARGET, RUN, RUN, tuned, source="t" if kind != "plan" else "").text()
    data = tomllib.loads(text)
    assert faults(data, of(kind)) == []
    data["base"]["wdth"] = 3
    assert faults(data, of(kind)) == [".base: unknown key wdth"]


WRONG = [
    "base.width='wide'",
    "base.layrs=2",
    "tuned.optimizer='adam'",
    "target.moe='many'",
    "run.schedule='linar'",
    "sweep.lr=0.1",
    "what=1",
]


def read(data: dict[str, Any]) -> None:
    """Have every table read by whatever reads it."""
    plan_inputs({k: v for k, v in data.items() if k not in ("data", "run", "sweep")})
    sweep_from({k: v for k, v in data.items() if k not in ("target", "tuned", "rule")}, Path())


@pytest.mark.parametrize("said", WRONG)
def test_what_no_reader_takes_is_refused(said: str) -> None:
    """Negative controls; each is refused by the reader of its table, too."""
    good = tomllib.loads(Starter("train", BASE, TARGET, RUN, RUN, TUNED, source="t").text())
    good["sweep"] = {"lr": [0.1], "weight_decay": [0.1], "init_std": [0.1]}
    assert faults(good, of("train")) == []
    path, _, value = said.partition("=")
    *tables, key = path.split(".")
    place = good
    for table in tables:
        place = place[table]
    place[key] = tomllib.loads(f"x = {value}")["x"]
    assert len(faults(good, of("train"))) == 1
    with pytest.raises(ValueError, match=f"{key}|many"):
        read(good)


def test_kinds_and_words() -> None:
    for kind in KINDS:
        made = of(kind)
        json.dumps(made)
        assert made["additionalProperties"] is False and set(made["required"]) <= set(made["properties"])
        assert set(made["properties"]) <= set(TABLE_WORDS)
    with pytest.raises(ValueError, match="did you mean 'study'"):
        schema("studdy")
    plain = of("sweep")["properties"]
    for table in ("base", "tuned", "data", "run"):
        words = KEY_WORDS["shape" if table == "base" else table]
        assert set(plain[table]["properties"]) <= set(words), table
