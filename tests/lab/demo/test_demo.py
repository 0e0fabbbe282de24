"""The demo in seconds: the same steps on a model and a text that small, and what it says of whatever came out."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mue.lab.demo.demo import FILE, demo
from mue.lab.demo.report import APPROACHES, findings, report_again
from mue.lab.report import plots
from mue.plan.toml import read_toml


def tiny() -> dict[str, Any]:
    """The demo's file with a few steps of a few tokens."""
    data = read_toml(FILE)
    for table in (data["base"], data["target"]):
        table["sequence"] = 32
        table["training"] = {"batch": 128, "steps": 8}
    data["target"].update(width=64, expert=16)
    data["sweep"].update(lr=[0.008, 0.016, 0.032], init_std=[0.06])
    data["run"].update(eval_sequences=8, eval_every=4)
    return data


def test_from_the_sweep_to_the_page_and_again_without_training(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    page = demo(out, Console(quiet=True), workers=2, tables=tiny())
    summary = json.loads((out / "demo.json").read_text())
    assert set(summary["check"]) == set(APPROACHES) == set(summary["transferred"])
    for rule, check in summary["check"].items():
        assert set(check) >= {"loss_at_1", "losses", "valley"} and set(check["losses"]) == {"0.5", "1", "2"}
        assert summary["transferred"][rule][0] == check["loss_at_1"]
    assert len(summary["samples"]["before"]) > 20 and len(summary["samples"]["after"]) > 20
    html = unescape(page.read_text(encoding="utf-8"))
    assert all(sentence.split("(")[0][:60] in html for sentence in findings(summary))
    assert "What it writes" in html and (out / "gained.png").exists()
    # gone on with: nothing is trained, and the numbers are the same
    trained = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
    demo(out, Console(quiet=True), workers=2, tables=tiny())
    again = json.loads((out / "demo.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")} == trained
    assert again["runs"] == summary["runs"] and again["seconds"] == summary["seconds"]
    assert report_again(out) == page


def summary(ours: list[float | None], plain: list[float | None]) -> dict[str, Any]:
    """A summary in which complete-mue and the plain numbers reached these losses, seed by seed."""
    run = {"val_loss": 1.5, "tokens": 1000, "active_parameters": 100}
    stacks = [1.5, 1.5]
    each = {"complete-mue": ours, "hidden-ratio-only": stacks, "standard": plain}
    return {
        "runs": {"base": run, "dense": run, "MoE": run},
        "transferred": each,
        "check": {rule: {"losses": {"0.5": 1.6, "1": losses[0], "2": 1.7}} for rule, losses in each.items()},
    }


def test_the_sentences_say_what_came_out_also_where_it_does_not_flatter() -> None:
    better, worse = findings(summary([1.4, 1.42], [1.5, 1.5])), findings(summary([1.6, 1.62], [1.5, 1.5]))
    assert any("complete-mue ends 0.090 lower than the base's numbers as they are, in each seed" in s for s in better)
    assert any("complete-mue ends 0.110 higher than the base's numbers as they are, in each seed" in s for s in worse)
    mixed = findings(summary([1.4, 1.56], [1.5, 1.5]))
    assert any("not in each seed: level" in s for s in mixed)
    diverged = findings(summary([1.4, 1.42], [None, 1.5]))
    assert any("as they are diverged" in s for s in diverged) and not any(
        "than the base's numbers" in s for s in diverged
    )


@pytest.mark.parametrize("rule", APPROACHES)
def test_every_approach_has_a_colour_of_its_own(rule: str) -> None:
    from mue.lab.demo.report import COLORS

    assert [c for r, c in COLORS.items() if r != rule].count(COLORS[rule]) == 0 and COLORS["complete-mue"] == plots.MUE
