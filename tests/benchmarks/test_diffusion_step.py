"""What is said of a diffusion step's cost is what its file has."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def worst(rows: list[dict[str, float | str]], pair: str) -> float:
    """The largest ratio."""
    return max(float(row["ratio"]) for row in rows if row["pair"] == pair)


def test_the_pages_say_what_was_measured() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "diffusion_step.json").read_text())["rows"]
    page, changes = ((ROOT / name).read_text() for name in ("docs/performance.md", "CHANGELOG.md"))
    said = re.search(
        r"at most ([\d.]+) language steps of equal FLOPs; 8e2a costs at most ([\d.]+) times a dense step", page
    )
    listed = re.search(r"costs at most ([\d.]+) language steps of equal FLOPs", changes)
    assert said is not None and listed is not None
    for pair, number, most in (("diffusion / language", said[1], 1.3), ("8e2a / dense", said[2], 1.3)):
        assert worst(rows, pair) <= float(number) <= most
    assert float(listed[1]) == float(said[1])
    slower = [{**row, "ratio": 1.36} for row in rows]  # negative control: what it cost before
    assert worst(slower, "diffusion / language") > float(said[1])
