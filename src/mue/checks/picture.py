"""Pictures of the long checks. matplotlib is imported here and nowhere else in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mue.checks.slopes import FAIL, Slope

if TYPE_CHECKING:
    from mue.checks.overlay import Overlay


def coordinates_picture(slopes: Sequence[Slope], path: str | Path) -> None:
    """One panel per axis: value against size in log-log, mean over seeds; what fails is drawn thick and dashed."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(s.axis for s in slopes))
    figure = Figure(figsize=(4.6 * len(axes), 4.4), layout="constrained")
    for i, axis in enumerate(axes):
        panel = figure.add_subplot(1, len(axes), i + 1)
        for s in (s for s in slopes if s.axis == axis):
            sizes = sorted({x for x, _ in s.points})
            mean = [_mean([v for x, v in s.points if x == size]) for size in sizes]
            failed = s.verdict == FAIL
            label = f"{s.module}, {s.quantity} {s.slope:+.2f}"
            panel.plot(sizes, mean, marker="o", ms=3, lw=2.5 if failed else 1, ls="--" if failed else "-", label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, title=axis)
        panel.set_xticks(sizes, [f"{x:g}" for x in sizes])
        panel.minorticks_off()
        panel.legend(fontsize=5.5)
    figure.savefig(path, dpi=140)


def overlay_picture(losses: Mapping[str, Sequence[float]], overlay: Overlay, path: str | Path) -> None:
    """Loss curves over each other, and their differences to the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    reference = losses[overlay.reference]
    for name, curve in losses.items():
        left.plot(curve, lw=1, label=name)
        right.plot([a - b for a, b in zip(curve, reference, strict=False)], lw=1, label=name)
    left.set(xlabel="step", ylabel="loss", title="first steps")
    right.set(xlabel="step", ylabel=f"loss − {overlay.reference}", title="gap")
    left.legend(fontsize=7)
    figure.savefig(path, dpi=140)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
