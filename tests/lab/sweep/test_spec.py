"""A sweep file: what it means where it is silent, and what it says of a mistake."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from conftest import EXPERIMENT
from mue.lab.sweep.spec import SweepSpec, sweep_from
from support.paths import ROOT

HERE = Path("/somewhere")
VALLEY = {"lr": [0.032, 0.002], "sampler": "valley"}


def spec(**sweep: Any) -> SweepSpec:
    """The fixture's file with other values under [sweep]; None leaves one out."""
    data = tomllib.loads(EXPERIMENT)
    data["sweep"] = {k: v for k, v in {**data["sweep"], **sweep}.items() if v is not None}
    return sweep_from(data, HERE)


def test_a_grid_has_one_seed_and_a_valley_search_three() -> None:
    assert spec().grid.seeds == (0,) and spec().grid.trials is None
    found = spec(**VALLEY).grid
    assert found.seeds == (0, 1, 2) and found.trials == 40 and found.lr == (0.002, 0.032)
    assert spec(**VALLEY, seeds=[7]).grid.seeds == (7,)
    assert SweepSpec.from_dict(spec(**VALLEY).to_dict()) == spec(**VALLEY)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"lr": None}, r"\[sweep\] needs lr: a list of values, e.g. lr = \[0.001"),
        ({"lr": 0.001}, r"\[sweep\] lr must be a list of numbers, got 0.001"),
        ({"lr": [0.0]}, r"\[sweep\] lr must be greater than 0, got 0"),
        ({"seeds": 3}, r"\[sweep\] seeds must be a list of whole numbers, got 3"),
        ({"seeds": [-1]}, r"\[sweep\] seeds must be a list of whole numbers"),
        ({"sampler": "valey"}, r"sampler must be one of grid, .*got 'valey'"),
        ({"sampler": "random"}, r"trials goes with sampler = valley, random.* or "),
        ({"trials": 10}, r"trials goes with sampler = valley, random.* or "),
        ({"precision": 0.1}, r'precision goes with sampler = "valley"'),
        ({**VALLEY, "lr": 0.002}, r"\[sweep\] lr must be a list of numbers"),
        ({**VALLEY, "lr": [0.002, 0.002]}, r"lr needs the two ends of the range"),
        ({**VALLEY, "precision": -1}, r"\[sweep\] precision must be greater than 0, got -1"),
        ({**VALLEY, "extend": 1}, r"\[sweep\] extend must be true or false, got 1"),
        ({"runner": "gpu"}, r"runner must be one of auto, processes, stacked, got 'gpu'"),
        ({"presicion": 1}, r"presicion.*precision"),
        (
            {"betas": [0.9, 0.95]},
            r"\[sweep\] betas must list pairs .* e.g. betas = \[\[0.9, 0.95\], .*got \[0.9, 0.95\]",
        ),
        ({"betas": []}, r"\[sweep\] betas must list pairs"),
        ({"betas": "linear"}, r"\[sweep\] betas must list pairs .*got 'linear'"),
        ({"betas": [[0.9, 0.95, 0.99]]}, r"\[sweep\] betas must list pairs"),
        ({"betas": [[0.9, 1.0]]}, r"\[sweep\] betas must .*1"),
        ({"betas": [[0.9, "0.95"]]}, r"\[sweep\] betas must be a .*number"),
    ],
)
def test_a_mistake_is_named(sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec(**sweep)


def test_betas_are_looked_for_or_given_and_not_both() -> None:
    data = tomllib.loads(EXPERIMENT)
    data["sweep"]["betas"] = [[0.9, 0.95], [0.8, 0.9], [0.9, 0.95]]
    found = sweep_from(data, HERE)
    assert found.grid.betas == ((0.9, 0.95), (0.8, 0.9))  # each once
    assert SweepSpec.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match=r"\[tuned\] betas is what the sweep looks for"):
        sweep_from({**data, "tuned": {**data.get("tuned", {}), "betas": [0.9, 0.95]}}, HERE)
    # a sweep without them is the experiment it always was; with them it is one, whichever pairs are asked for
    other = sweep_from({**data, "sweep": {**data["sweep"], "betas": [[0.5, 0.9]]}}, HERE)
    assert found.identity("x") == other.identity("x") and "betas" not in found.identity("x")["tuned"]
    assert spec().identity("x")["tuned"]["betas"] == [0.9, 0.95] and "betas" not in spec().to_dict()["grid"]


def test_the_documented_search_is_a_sweep_file() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    betas, search = (tomllib.loads(block.partition("```")[0])["sweep"] for block in page.split("```toml\n")[1:])
    assert spec(**betas).grid.betas == ((0.9, 0.95), (0.8, 0.9))
    grid = spec(**search).grid
    assert grid.sampler == "valley" and grid.options["extend"] and grid.stop_early and grid.trials == 40
