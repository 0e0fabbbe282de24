"""precision = "auto": decided once by measurement, kept, and never decided otherwise by whoever goes on or takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mue.lab.data import Corpus
from mue.lab.runners import precision
from mue.lab.runners.precision import PRECISION_FILE, settle_precision
from mue.lab.train.run import Run, Settings
from mue.lab.train.spec import settings_from
from support.small_run import moe_run

AUTO: dict[str, Any] = {"run": {"precision": "auto", "seed": 3}, "base": {"width": 8}}


def says(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(precision, "_measure", lambda run, corpus: {"fp32": fp32, "bf16": bf16})


@pytest.fixture
def example(corpus: Corpus) -> Any:
    return lambda tables: (moe_run(corpus), corpus)


@pytest.mark.parametrize(("bf16", "found"), [(0.5, "bf16"), (0.97, "fp32"), (1.5, "fp32")])
def test_bf16_is_taken_where_it_is_clearly_faster(
    bf16: float, found: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, 1.0, bf16)
    tables, told = settle_precision(AUTO, tmp_path, example)
    assert tables == {"run": {"precision": found, "seed": 3}, "base": {"width": 8}}
    assert AUTO["run"]["precision"] == "auto" and told is not None and found in told and PRECISION_FILE in told
    assert settings_from(tables) == Settings(seed=3, precision=found)


def test_what_was_decided_stays(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, 1.0, 0.5)
    settle_precision(AUTO, tmp_path, example)
    says(monkeypatch, 0.5, 1.0)  # a machine on which fp32 is faster
    tables, told = settle_precision(AUTO, tmp_path, example)
    assert tables["run"]["precision"] == "bf16" and told is not None and "as decided" in told
    other, _ = settle_precision(AUTO, tmp_path / "another", example)  # the control: elsewhere it is measured
    assert other["run"]["precision"] == "fp32"


def test_whoever_takes_part_measures_nothing(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, 1.0, 2.0)
    asked: list[str] = []

    def decided(of: Any) -> str:
        asked.extend(of(name)["run"]["precision"] for name in ("fp32", "bf16"))
        return "bf16"

    tables, _ = settle_precision(AUTO, tmp_path, example, decided=decided)
    assert tables["run"]["precision"] == "bf16" and asked == ["fp32", "bf16"]
    assert settle_precision(AUTO, tmp_path, example)[0] == tables  # and it is kept
    nobody, _ = settle_precision(AUTO, tmp_path / "new", example, decided=lambda of: None)
    assert nobody["run"]["precision"] == "fp32"


def test_a_precision_that_is_said_is_left_alone(example: Any, tmp_path: Path) -> None:
    for tables in ({}, {"run": {"precision": "bf16"}}):
        assert settle_precision(tables, tmp_path / "none", example) == (tables, None)
    assert not (tmp_path / "none").exists()


def test_a_damaged_answer_is_named(example: Any, tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"precision": "fp8"})):
        (tmp_path / PRECISION_FILE).write_text(text)
        with pytest.raises(ValueError, match=f"{PRECISION_FILE}.*remove it to measure again"):
            settle_precision(AUTO, tmp_path, example)


def test_what_is_no_run_leaves_no_folder(corpus: Corpus, tmp_path: Path) -> None:
    def wrong(tables: Any) -> tuple[Run, Corpus]:
        raise ValueError("no such text")

    with pytest.raises(ValueError, match="no such text"):
        settle_precision(AUTO, tmp_path / "none", wrong)
    assert not (tmp_path / "none").exists()


def test_the_measurement_trains_the_run_in_both(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MEASURED_SECONDS", 0.0)
    found = precision._measure(moe_run(corpus), corpus)
    assert list(found) == ["fp32", "bf16"] and all(seconds > 0 for seconds in found.values())


def test_whoever_reads_it_unsettled_is_told() -> None:
    with pytest.raises(ValueError, match='"auto" is settled by mue train'):
        settings_from(AUTO)
    assert settings_from(AUTO, auto="fp32").precision == "fp32"
