"""docs/routers.md quotes docs/results/gate_moments.json."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from mue.shapes import ROUTERS
from support.paths import ROOT

FILE = json.loads((ROOT / "docs" / "results" / "gate_moments.json").read_text(encoding="utf-8"))
PAGE = (
    (ROOT / "docs" / "routers.md").read_text(encoding="utf-8").partition("## Weights at init")[2].partition("\n## ")[0]
)


def unsaid(row: dict[str, Any]) -> list[float]:
    """Numbers of a router that its line of the page has not."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{row['router']}` |")]
    shown = [float(x) for x in re.findall(r"(?<![\w`])\d+\.\d+", line.replace(f"`{row['router']}`", ""))]
    wanted = [round(layer[name], 4) for layer in row["measured"] for name in ("m1", "m2")]
    wanted.append(round(row["coordinates"]["largest_distance"], 2))
    assert f"{row['coordinates']['failed']} of {row['coordinates']['slopes']}" in line
    return [x for x in wanted if x not in shown]


def test_the_table_says_what_the_file_says() -> None:
    for row in FILE["routers"]:
        assert unsaid(row) == [], row["router"]
        other = copy.deepcopy(row)  # the control: another number is not on the page
        other["measured"][1]["m2"] += 0.1
        assert len(unsaid(other)) == 1


def test_those_with_a_formula_are_near_it_or_the_page_says_how_far() -> None:
    """Within the interval; by 1e-5 where weights sum to one. For the others the page has the larger distance of the two layers."""
    assert {row["router"] for row in FILE["routers"]} <= {
        name for name, kind in ROUTERS.items() if kind.defined_in.startswith("mue.")
    }
    far = {}
    for row in FILE["routers"]:
        planned = (row["formula"] or [1.0])[0]
        off = [layer["m1"] - planned for layer in row["measured"]]
        if any(abs(x) > max(layer["m1_error"], 1e-5) for x, layer in zip(off, row["measured"], strict=True)):
            far[row["router"]] = f"up to {max(-x / planned for x in off):.0%} lower".replace("%", " %")
    assert set(far) == {"expert-choice", "switch"}
    for name, words in far.items():
        assert re.search(rf"`{name}`[^.:]* is {words}", PAGE), (name, words)
