"""The picture of a coordinate check. matplotlib is imported here and nowhere else in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mue.checks.slopes import FAIL, Slope


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
