"""The two pictures of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from public.cells import Cell
from public.slopes import log2_batch, position
from public.steplaw import SEQUENCE

PANELS = (("dense", "d960 L7"), ("dense", "d1280 L10"), ("moe", "1in89"), ("moe", "3in8"))
COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def draw(cells: Mapping[str, Sequence[Cell]], found: Mapping[str, Any], folder: Path) -> list[Path]:
    """``public-runs-surface.png`` and ``public-runs-slopes.png`` in a folder."""
    return [
        _surface(cells, found, folder / "public-runs-surface.png"),
        _slopes(found, folder / "public-runs-slopes.png"),
    ]


def _surface(cells: Mapping[str, Sequence[Cell]], found: Mapping[str, Any], path: Path) -> Path:
    """Best learning rate over batch, a line for each number of tokens; a star at the batch of the lowest loss."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=False, layout="constrained")
    for axis, (kind, name) in zip(axes, PANELS, strict=True):
        own = [c for c in cells[kind] if c.shape.name == name]
        for colour, tokens in zip(COLOURS, sorted({c.tokens for c in own}), strict=False):
            row = sorted((c for c in own if c.tokens == tokens), key=log2_batch)
            x = [c.batch / SEQUENCE for c in row]
            y = [2.0 ** position(c) for c in row]
            low = [v - 2.0 ** (position(c) - c.valley.error) for v, c in zip(y, row, strict=True)]
            high = [2.0 ** (position(c) + c.valley.error) - v for v, c in zip(y, row, strict=True)]
            axis.errorbar(x, y, [low, high], color=colour, marker="o", ms=3, lw=1.2, label=f"{tokens / 1e9:g} B tokens")
        points = found[kind]["along the best batch"]["points"]
        stars = [(2.0**batch / SEQUENCE, 2.0**rate) for shape, _, batch, rate in points if shape == name]
        axis.plot(*zip(*stars, strict=True), "*", color="#e6550d", ms=11, mec="white", zorder=5, label="lowest loss")
        axis.set(
            xscale="log",
            yscale="log",
            title=f"{'dense' if kind == 'dense' else 'MoE'} {name}",
            xlabel="batch, sequences of 2,048",
        )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:.1e}")
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7, loc="lower right")
        _half(axis, min(c.batch for c in own) / SEQUENCE)
    axes[0].set_ylabel("best learning rate")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _half(axis: Axes, left: float) -> None:
    """A dashed line of slope ½: the square-root rule for the batch."""
    top = axis.get_ylim()[1]
    axis.plot([left, left * 16], [top / 4.4, top / 1.1], "k--", lw=0.8, alpha=0.6)
    axis.annotate("√batch", (left * 5, top / 1.7), fontsize=7, rotation=0, ha="right")


def _slopes(found: Mapping[str, Any], path: Path) -> Path:
    """Slopes between neighbouring cells, by where their batch lies against the best one, with what rules and laws say."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    said = {
        "batch": {"complete-mue, Marin: ½": 0.5, "standard, Step Law: 0": 0.0},
        "tokens": {
            "complete-mue: -½": -0.5,
            "Zhou et al.: -0.35": -0.3509,
            "Marin August: -0.35": -0.346,
            "standard: 0": 0.0,
            "Step Law: +0.31": 0.307,
        },
    }
    for axis, what in zip(axes, said, strict=True):
        for kind, colour, shift in (("dense", "#08519c", -0.04), ("moe", "#e6550d", 0.04)):
            rows = found[kind]["local"][what]
            x, y = [r["middle"] + shift for r in rows], [r["slope"] for r in rows]
            bars = [[r["slope"] - r["interval"][0] for r in rows], [r["interval"][1] - r["slope"] for r in rows]]
            axis.errorbar(x, y, bars, color=colour, marker="o", capsize=3, label="MoE" if kind == "moe" else "dense")
        for name, value in said[what].items():
            axis.axhline(value, color="grey", lw=0.8, ls="--")
            if "Marin August" not in name:
                left = name.startswith("standard, Step Law")
                place = (-2.8 if left else 3.0, value)
                axis.annotate(name, place, fontsize=7, va="bottom", ha="left" if left else "right", color="dimgrey")
        axis.axvline(0, color="grey", lw=0.6)
        axis.set(
            title=f"{'batch' if what == 'batch' else 'tokens'} × 2, {'tokens' if what == 'batch' else 'batch'} fixed",
            xlabel="octaves of the batch above the best one",
            ylabel="octaves that lr* moves",
            xlim=(-2.9, 3.1),
        )
        axis.legend(fontsize=8, loc="upper right" if what == "batch" else "upper left")
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
