"""docs/performance.md quotes what benchmarks measured: rows of its tables are made again from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
WORDS = {"nudged": "fp32, init × (1 + 10⁻⁶)", "bf16, torch": "bf16, torch's operators"}


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))["rows"]
    return rows


def test_runs_in_bf16_are_quoted_as_they_ended() -> None:
    rows = {(row["model"], row["way"]): row for row in results("precision.json")}
    for way in ("nudged", "bf16", "bf16, portable experts", "bf16, torch"):
        cells = [
            f"{row['minus fp32']:+.4f} ± {row['standard error']:.4f}" if (row := rows.get((model, way))) else "–"
            for model in ("base", "MoE")
        ]
        assert f"| {WORDS.get(way, way)} | {' | '.join(cells)} |" in PAGE, way
        took = rows["MoE", way]["time / fp32"]
        assert (
            abs(
                took
                - float(PAGE.split(f"| {WORDS.get(way, way)} | {' | '.join(cells)} | ")[1].split(" |")[0].strip("*"))
            )
            <= 0.0051
        )
    assert {len(row["losses"]) for row in rows.values()} == {12} and "twelve seeds each" in PAGE


def test_gradients_are_quoted_and_the_kernels_are_the_nearest() -> None:
    errors = {row["way"]: row["error"] for row in results("precision_gradients.json")}
    kernel, torch = errors["bf16"], errors["bf16, torch"]
    said = f"errors of {100 * min(kernel.values()):.1f} to {100 * max(kernel.values()):.1f} %, torch's {100 * min(torch.values()):.1f} to {100 * max(torch.values()):.1f} %"
    assert said in PAGE
    for other in ("bf16, portable experts", "bf16, torch"):
        assert all(kernel[name] < errors[other][name] for name in kernel), other
    assert all(abs(longer) < 0.004 for row in results("precision_gradients.json") for longer in row["longer"].values())


def test_steps_are_quoted_in_milliseconds() -> None:
    tables = PAGE.split("**The whole step**")[1].split("**A sweep's runs**")[0].split("Without them:")
    for table, name in zip(tables, ("train_step.json", "train_step_without_bf16.json"), strict=True):
        rows = {(r["impl"], r["dtype"], r["compiled"]): r["ms"] for r in results(name) if r["shape"] == "small"}
        columns = [(dtype, compiled) for compiled in (False, True) for dtype in ("float32", "bfloat16")]
        for impl in dict.fromkeys(impl for impl, *_ in rows):
            cells = ["–" if (ms := rows.get((impl, *column))) is None else f"{ms:.0f}" for column in columns]
            assert f"| {impl} | {' | '.join(cells)} |" in table, (name, impl)


@pytest.mark.parametrize("routing", ["fresh", "zipf"])
def test_the_layers_ratios_are_quoted(routing: str) -> None:
    rows = {
        (r["impl"], r["shape"], r["dtype"]): r["ratio"] for r in results("moe_layer.json") if r["routing"] == routing
    }
    columns = [
        (shape, dtype) for shape in dict.fromkeys(shape for _, shape, _ in rows) for dtype in ("float32", "bfloat16")
    ]
    table = PAGE.split("With bf16 instructions, balanced routing:")[1].split("Zipf routing:")[routing == "zipf"]
    for impl in dict.fromkeys(impl for impl, *_ in rows if impl != "dense-eager"):
        cells = ["–" if (ratio := rows.get((impl, *column))) is None else f"{ratio:.2f}" for column in columns]
        assert f"| {impl} | {' | '.join(cells)} |" in table.replace("**", ""), impl
