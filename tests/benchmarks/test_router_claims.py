"""The claims that are shipped, their table in the docs, and the command in small: killed, gone on with, joined, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claims.rows import ClaimFolder
from claims.spec import Claims, read_claims
from claims.table import BEGIN, END, table
from claims.verdict import judge
from mue.lab.study.schedule import Schedule
from mue.lab.study.spec import study_from
from mue.plan.toml import read_toml
from mue.shapes.routers import ROUTERS
from router_claims import main
from support.claims import BASE, claims_folder
from support.paths import ROOT

ROWS = ROOT / "docs" / "results" / "router_claims.jsonl"


@pytest.fixture(scope="module")
def shipped() -> Claims:
    return read_claims()


def test_the_page_says_what_the_rows_say(shipped: Claims) -> None:
    rows = ClaimFolder(Path("runs"), ROWS, shipped).by_identity()
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0] == table([judge(shipped, claim, rows) for claim in shipped.all])


def test_what_is_shipped_has_power_and_reaches_every_section(shipped: Claims) -> None:
    assert len(shipped.all) >= 25
    for claim in shipped.all:
        ROUTERS.lookup(claim.router)
        for check in claim.checks:  # controls may be of models that have learnt nothing
            assert all(shipped.arms[claim.group, value.arm].tokens_per_parameter >= 10 for value in check.values)
    used = {(claim.group, value.arm) for claim in shipped.all for value in claim.values}
    assert used == set(shipped.arms)  # nothing is trained for nobody
    of = {claim.router for claim in shipped.all}
    assert {"elastic", "dtop-p", "unipool", "top-p", "sigmoid", "expert-choice", "quantile", "thor", "dynamoe"} <= of


def test_valleys_of_routers_with_their_moments_and_without() -> None:
    spec = study_from(read_toml(ROOT / "benchmarks" / "studies" / "routers.toml"), Path("/somewhere"))
    cells = Schedule(spec, {"hash": "0" * 64}).cells
    assert not [cell.refused for cell in cells if cell.refused]
    by = {(cell.target.axis, cell.target.name): cell for cell in cells}
    for axis in ("unipool", "raw softmax", "top-p", "dtop-p"):
        with_, without = (by[axis, name].plan.target.blocks[0] for name in ("with the moments", "without"))  # type: ignore[union-attr]
        assert without.route_scale == without.active and without.kappa == 1
        assert (with_.route_scale, with_.kappa) != (without.route_scale, without.kappa)
        assert len(by[axis, "without"].multipliers) >= 5 and len(by[axis, "without"].target.seeds) >= 2
    measured = by["raw softmax", "with the moments"].target.shape.blocks[0].gate_moments
    told = ROUTERS.lookup("switch")  # raw softmax scores as well, whose moments are integrals over the same logits
    assert told.moments is not None and measured is not None
    logits = told.complete({"logit_std": 0.03 * 32**0.5, "jitter": 0.0, "random_second": False})
    largest, _ = told.moments(1, 16, logits)
    assert largest < measured[0] < 4 * largest


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a command on two claims of seconds."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    (tmp_path / "base.toml").write_text(BASE, encoding="utf-8")
    (tmp_path / "page.md").write_text(f"# Page\n{BEGIN}{END}after\n", encoding="utf-8")
    folder = claims_folder(tmp_path)
    paths = {"claims": folder, "base": tmp_path / "base.toml", "out": tmp_path / "out", "rows": tmp_path / "rows.jsonl"}
    return [f"--{name}={path}" for name, path in {**paths, "page": tmp_path / "page.md"}.items()]


def test_killed_gone_on_with_and_written_down(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--dry-run"]) == 0
    assert "9 runs to train (0 done)" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()
    assert main([*small, "--only=alone", "--workers=1"]) == 0
    first = (tmp_path / "rows.jsonl").read_bytes()
    assert len(first.splitlines()) == 3
    # killed in the middle of a row: its run lies there and is not trained again
    (tmp_path / "rows.jsonl").write_bytes(first[:-40])
    # and a claim that has come to read more of a run measures it anew, without training it
    file = tmp_path / "claims" / "group.toml"
    file.write_text(file.read_text().replace('{ of = "a.loss", apart = 1 }', '{ of = "a.max_vio", below = 9 }'))
    before = {row["key"]: row for row in map(json.loads, first.splitlines())}
    assert main([*small, "--only=alone", "--workers=1"]) == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    after = {row["key"]: row for row in map(json.loads, (line for line in lines if line.endswith("}")))}
    assert len(lines) == 6 and after.keys() == before.keys()
    for key, row in after.items():
        assert set(row["seen"]) == {"loss", "max_vio"}
        assert row | {"seen": before[key]["seen"]} == before[key]  # its seconds among the rest
        assert row["seen"]["loss"] == before[key]["seen"]["loss"]
    assert main([*small, "--table"]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Page\n") and page.endswith(f"{END}after\n")
    assert "Of 2 claims: not measured 1, " in page  # "alone" was judged, "better" lacks runs
    capsys.readouterr()
    assert main([*small, "--minutes=0", "--workers=1"]) == 0
    assert "6 runs are left" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_leaves_nothing(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        assert main([*small, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "'allone'" in refused("--only=allone") and "at least 1" in refused("--workers=0")
    assert "at least 0" in refused("--minutes=-1")
    (tmp_path / "page.md").write_text("no marks\n", encoding="utf-8")
    assert "needs the lines" in refused("--table")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "no marks\n"
    other = {"key": "k", "of": "x", "data": "f" * 64, "seen": {}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(other) + "\n")
    assert "rows on other data" in refused("--only=alone", "--workers=1")
    assert not (tmp_path / "out" / "runs").exists()


def test_without_base_it_is_the_houses_text(tmp_path: Path) -> None:
    claims = read_claims(claims_folder(tmp_path), cache=tmp_path / "cache")
    assert claims.source["source"] == "stdlib"
    assert claims.arms["group", "a"].plan.training.tokens == 640 * 4096  # type: ignore[union-attr]
