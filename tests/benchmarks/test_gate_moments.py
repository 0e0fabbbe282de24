"""docs/routers.md quotes docs/results/gate_moments.json."""

from __future__ import annotations

import json
import re

from mue.shapes import ROUTERS
from support.paths import ROOT

FILE = json.loads((ROOT / "docs" / "results" / "gate_moments.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")


def test_the_table_says_what_the_file_says() -> None:
    table = PAGE.partition("## Weights at init")[2].partition("\n## ")[0]
    for row in FILE["routers"]:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{row['router']}` |")]
        shown = [float(x) for x in re.findall(r"(?<![\w`])\d+\.\d+", line.replace(f"`{row['router']}`", ""))]
        for layer in row["measured"]:
            assert round(layer["m1"], 4) in shown and round(layer["m2"], 4) in shown, row["router"]
        assert round(row["coordinates"]["largest_distance"], 2) in shown
        assert f"{row['coordinates']['failed']} of {row['coordinates']['slopes']}" in line
        assert 0.12345 not in shown  # the control


def test_those_with_a_formula_are_near_it() -> None:
    """Within the interval, or within what the page says of text."""
    assert {row["router"] for row in FILE["routers"]} <= {
        name for name, kind in ROUTERS.items() if kind.defined_in.startswith("mue.")
    }
    off = {"expert-choice": 0.16, "switch": 0.25}
    for row in FILE["routers"]:
        planned = (row["formula"] or [1.0])[0]
        for layer in row["measured"]:
            assert abs(layer["m1"] - planned) <= max(layer["m1_error"], off.get(row["router"], 0.01) * planned), row[
                "router"
            ]
