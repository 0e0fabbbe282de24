"""What a sweep tuned is used by runs like its own: another schedule or task is refused by name, as another base is."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conftest import EXPERIMENT
from mue.cli.app import say_data, with_sweep
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.tuned import tuned_of
from mue.util.files import write_json


def swept(folder: Path, run: dict[str, Any], base: dict[str, Any] | None = None, *, settings: bool = True) -> Path:
    """A finished sweep's folder, of the fixture's file with these keys under [run] and [base]."""
    data = tomllib.loads(EXPERIMENT)
    data["run"] |= run
    data["base"] = base or data["base"]
    spec = sweep_from(data, folder)
    identity = spec.identity("0" * 64)
    if not settings:
        del identity["settings"]
    write_json(folder / "result.json", {"tuned": spec.defaults.to_dict(), "identity": identity})
    return folder


def tables(run: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file that trains the same base."""
    data = tomllib.loads(EXPERIMENT)
    return {"base": base or data["base"], "data": data["data"], "run": run}


EXPERTS = {**tomllib.loads(EXPERIMENT)["base"], "moe": "4e2a", "expert": 32}
del EXPERTS["ffn"]


@pytest.mark.parametrize(
    ("tuned", "trained", "words"),
    [
        ({"schedule": "cosine"}, {}, r'tuned with schedule = "cosine", this trains with "wsd": put schedule = "cosine" under \[run\]'),
        ({}, {"schedule": "cosine"}, r'tuned with schedule = "wsd", this trains with "cosine"'),
        ({"decay": 0.5}, {}, r"tuned with decay = 0.5, this trains with 0.2: put decay = 0.5"),
        ({}, {"decay": 0}, r"tuned with decay = 0.2, this trains with 0:"),
        ({"task": "order"}, {}, r'tuned with task = "order", this trains with "language"'),
        ({"schedule": "cosine", "decay": 0.5}, {"schedule": "cosine"}, ""),  # which has no decay
        ({"schedule": "wsqd", "shift": 50}, {"schedule": "wsqd", "shift": 60}, r"tuned with shift = 50, this trains with 60"),
        ({"schedule": "wsqd", "shift": 50}, {"schedule": "wsqd", "shift": 50, "decay": 0.5}, r"tuned with decay = 0.2"),
        ({"seed": 3, "eval_every": 5, "log_every": 1}, {"eval_sequences": 1}, ""),
        ({"balance": "none"}, {}, ""),  # a dense base has none
    ],
)  # fmt: skip
def test_what_a_run_does_not_share_is_refused_by_name(
    tmp_path: Path, tuned: dict[str, Any], trained: dict[str, Any], words: str
) -> None:
    folder = swept(tmp_path, tuned)
    if not words:
        assert with_sweep(tables(trained), folder)[1] == tuned_of(folder).tuned
        return
    with pytest.raises(ValueError, match=words):
        with_sweep(tables(trained), folder)
    assert with_sweep(tables(tuned), folder)[1] == tuned_of(folder).tuned  # the control: as it was tuned


def test_of_a_base_with_experts_their_balance_is_shared_too(tmp_path: Path) -> None:
    folder = swept(tmp_path, {"balance": "none"}, EXPERTS)
    with pytest.raises(ValueError, match='tuned with balance = "none", this trains with "bias"'):
        with_sweep(tables({}, EXPERTS), folder)
    with_sweep(tables({"balance": "none"}, EXPERTS), folder)


def test_another_precision_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = swept(tmp_path, {})
    with_sweep(tables({"precision": "bf16"}), folder)
    assert "was tuned in fp32, this trains in bf16" in capsys.readouterr().err
    with_sweep(tables({"precision": "fp32"}), folder)
    assert capsys.readouterr().err == ""


def test_other_data_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When they are open, for only then are they known."""
    for data, said in (
        ("1" * 64, f"{tmp_path} was tuned on other data (sha256 {'0' * 16} there, {'1' * 16} here)"),
        ("0" * 64, ""),
    ):
        corpus = SimpleNamespace(summary=lambda: "one file", hash=data)
        say_data(Console(), corpus, swept(tmp_path, {}))
        assert capsys.readouterr().err == (f"note: {said}\n" if said else "")


def test_a_plan_says_what_its_readers_would_not_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no [run] to compare with, for its runs are somewhere else; nothing is said of what is usual."""
    planned = {"base": tables({})["base"]}
    for run, said in (
        ({"schedule": "cosine", "precision": "bf16"}, 'tuned with schedule = "cosine", precision = "bf16": they are'),
        ({"decay": 0.1}, "tuned with decay = 0.1: they are for runs with the same"),
        ({"eval_every": 7}, ""),
    ):
        with_sweep(planned, swept(tmp_path, run))
        err = capsys.readouterr().err
        assert said in err and bool(said) == bool(err)


def test_a_result_from_before_settings_were_kept_is_of_the_usual_ones(tmp_path: Path) -> None:
    folder = swept(tmp_path, {}, settings=False)
    assert with_sweep(tables({}), folder)[1] == tuned_of(folder).tuned
