"""The demo on images in seconds: the same steps on a model that small, and what it says of whatever came out."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from mue.lab.demo import diffusion, diffusion_report
from mue.lab.demo.demo import MULTIPLIERS
from mue.lab.demo.diffusion import FILE, GRID_FILE, diffusion_demo
from mue.lab.demo.diffusion_report import findings, write_diffusion_report
from mue.lab.models.sampling import Sampling
from mue.lab.report.grids import write_png
from mue.lab.report.page import Section
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from mue.lab.trained.images import classifier
from mue.lab.valley.multiplier_check import MultiplierCheck
from mue.plan.replan import scaled
from mue.plan.toml import read_toml
from support.diffusion import BASE, MOE, images, run_of


def tiny() -> dict[str, Any]:
    """The demo's file with a few steps of a few images."""
    data = read_toml(FILE)
    for table in (data["base"], data["target"]):
        table.update(layers=1, training={"batch": 64, "steps": 4})
    data["target"].update(width=32, expert=16)
    data["sweep"].update(lr=[0.008, 0.016], init_std=[0.1])
    data["run"].update(eval_sequences=4, eval_every=2, log_every=1)
    return data


@pytest.mark.slow  # twelve runs in processes of their own
def test_from_the_sweep_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "WAY", Sampling(steps=1))
    monkeypatch.setattr(diffusion, "OF_EACH", 2)
    monkeypatch.setattr(diffusion, "SHOWN", 2)
    monkeypatch.setattr(classifier, "_STEPS", 20)
    out = tmp_path / "demo"
    page = diffusion_demo(out, Console(quiet=True), workers=1, tables=tiny())
    summary = json.loads((out / "demo.json").read_text())
    assert set(summary["runs"]) == {
        *("base", "dense", "MoE", "MoE × 0.5", "MoE × 2"),
        *(f"{name}, seed {seed}" for name in ("MoE", "dense") for seed in (1, 2)),
    }
    assert [len(losses) for losses in summary["transferred"].values()] == [3, 3]
    moe, dense = (summary["runs"][name] for name in ("MoE", "dense"))
    assert dense["flops_per_token"] == pytest.approx(moe["flops_per_token"], rel=0.05)  # but for the router
    assert set(summary["check"]["losses"]) == {"0.5", "1", "2"} and summary["check"]["loss_at_1"] == moe["val_loss"]
    assert set(summary["scores"]) == {"MoE", "dense"} and summary["scores"]["MoE"]["count"] == 20
    assert matplotlib.image.imread(out / GRID_FILE).shape[:2] == (2 * 54 + 6, 10 * 54 + 6)
    html = unescape(page.read_text(encoding="utf-8"))
    assert all(sentence.split("(")[0][:60] in html for sentence in findings(summary))
    for words in ("over training", "fixed times", "by time step", "by image position", "Judged by", "no FID"):
        assert words in html


def test_it_says_what_came_out_whatever_it_is() -> None:
    own = {
        "count": 320, "asked": [0.5, 0.4, 0.6], "accuracy": 0.98, "distance": None, "floor": None, "features": "16 features",
        "copies": {"samples": 0.1, "held_out": 0.12, "share": 0.4},
    }  # fmt: skip
    run = {"val_loss": None, "tokens": 10}
    summary = {
        "runs": {"MoE": run, "dense": run, "base": {"val_loss": 0.5, "tokens": 5}},
        "transferred": {"MoE": [None, 0.4], "dense": [None, 0.4]},
        "scores": {"MoE": own},
        "way": {"guidance": 1.5},
        "check": {"losses": {"0.5": 0.4, "1": None, "2": None}},
    }
    said = " ".join(findings(summary))
    assert "0.4000 at 0.5×, diverged at 1×" in said and "50.0% (40.0% to 60.0%)" in said
    assert "Fréchet" not in said and "40.0% of the samples are nearer" in said
    assert "equal active FLOPs" not in said  # a mean over seeds of which one has no loss is none


def test_moe_and_dense_are_compared_seed_by_seed() -> None:
    run = {"val_loss": 0.4, "tokens": 10}
    summary = {
        "runs": {"MoE": run, "dense": run, "base": {"val_loss": 0.5, "tokens": 5}},
        # 1 % and 3 % below, of dense losses that differ by far more: 2 ± 1
        "transferred": {"MoE": [0.396, 0.776], "dense": [0.4, 0.8]},
        "scores": {},
        "way": {"guidance": 1.5},
        "check": {"losses": {"0.5": 0.4, "1": 0.4, "2": 0.4}},
    }
    said = findings(summary)[0]
    assert "means of 2 seeds" in said and "MoE reaches 0.5860" in said and "(-2.0 % ± 1.0, one standard error)" in said


@pytest.mark.parametrize("diverged", ["MoE", "base", "all"])
def test_what_diverged_is_said_and_the_rest_is_scored_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diverged: str
) -> None:
    for module, name, value in (
        (diffusion, "WAY", Sampling(steps=1)),
        (diffusion, "OF_EACH", 2),
        (diffusion, "SHOWN", 2),
        (classifier, "_STEPS", 20),
        (diffusion_report, "sweep_section", lambda *_: Section(id="sweep", title="The sweep")),
    ):
        monkeypatch.setattr(module, name, value)
    data, store = images(), Store(tmp_path)
    targets = {"dense": BASE, "MoE": MOE, "MoE × 0.5": MOE, "MoE × 2": MOE, "base": BASE}
    named = {}
    for seed, (name, shape) in enumerate(targets.items()):
        run = run_of(data, shape, steps=2, seed=seed)
        far = name.startswith(diverged) or diverged == "all"
        named[name] = Run(scaled(run.plan, 1e30), run.settings, run.data) if far else run
    results = {name: train(run, store, data, keep_weights=True) for name, run in named.items()}
    lost = {name for name in ("dense", "MoE", "base") if diverged in (name, "all")}
    assert {name for name in ("dense", "MoE", "base") if results[name]["status"] == "diverged"} == lost
    drawn = diffusion._drawn({n: run for n, run in named.items() if results[n]["status"] == "finished"}, store, data)
    picture = drawn.pop("grid")
    assert set(drawn["scores"]) == {"MoE", "dense"} - lost and (picture is None) == ("MoE" in lost)
    samples = None if picture is None else tmp_path / GRID_FILE
    if samples is not None:
        write_png(samples, picture)
    losses = {m: results[diffusion._name(m)]["val_loss"] for m in MULTIPLIERS}
    summary = {
        "runs": results,
        "transferred": {name: [results[name]["val_loss"]] * 2 for name in ("MoE", "dense")},
        "check": MultiplierCheck.of(losses).to_dict(),
        "sweep": {"tuned": {"lr": 0.01}},
        "data": data.describe(),
        **dict.fromkeys(("command", "machine", "torch", "python", "mue", "git"), "x"),
        "seconds": 1.0,
        **drawn,
    }
    page = write_diffusion_report(store, named, results, summary, [], samples)
    said = next(sentence for sentence in findings(summary) if "Diverged" in sentence)
    assert set(said.removesuffix(".").split(": ")[1].split("; ")) == lost
    assert said.split(":")[0] in unescape(page.read_text(encoding="utf-8"))


def test_the_docs_quote_a_run_that_is_there() -> None:
    root = Path(__file__).parents[3]
    summary = json.loads((root / "docs/results/diffusion_demo.json").read_text(encoding="utf-8"))
    quoted = (root / "docs/images.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert quoted.splitlines() == findings(summary)
    # what was asked of it: the class asked for, by a classifier that is right itself, and no copies
    own = summary["scores"]["MoE"]
    assert own["asked"][0] >= 0.9 and own["accuracy"] >= 0.97 and own["copies"]["share"] <= 0.05
    assert own["distance"] < 2 * own["floor"]
