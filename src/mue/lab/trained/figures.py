"""The picture of a model at other numbers of active experts."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.figure import Figure

from mue.lab.report.plots import CYCLE, GREY, INK, STYLE, figure
from mue.lab.trained.active import ActiveCurve

NAMES = {
    "mean": "mean: the weights sum to what they did",
    "root": "root: √(k′/k) times that",
    "sum": "sum: k′/k times that",
}  # of mue.moe.routers.base.SCALES, for the legend


def active_figure(curve: ActiveCurve, title: str) -> Figure:
    """Loss against active FLOPs, a line for each scale, k′ along the upper edge.

    Bars are intervals of the difference to the trained model on the same sequences, which says whether a point is above it.
    """
    before = curve.trained
    unit = "byte" if before.scores.per_byte is not None else "token"
    with mpl.rc_context(STYLE):
        fig, (axes,) = figure(6.8, 4.3)
        for i, scale in enumerate(curve.scales):
            points = curve.of(scale)
            above = [p.scores.above(before.scores) for p in points]
            axes.errorbar(
                [p.flops / 1e6 for p in points],
                [before.scores.loss.value + d.value for d in above],
                yerr=[d.half if math.isfinite(d.half) else 0.0 for d in above],
                fmt="o-", ms=4, lw=1.4, elinewidth=1, capsize=2, color=CYCLE[i % len(CYCLE)], label=NAMES.get(scale, scale),
            )  # fmt: skip
        axes.axhline(before.scores.loss.value, color=GREY, lw=1, ls=":")
        axes.plot(
            [before.flops / 1e6], [before.scores.loss.value], "*", ms=15, color=INK, mec="white", zorder=5,
            label=f"as trained: k = {before.active}",
        )  # fmt: skip
        ticks = {p.active: p.flops / 1e6 for p in curve.points}
        shown = dict(sorted(ticks.items())[:: max(1, len(ticks) // 12)])
        top = axes.secondary_xaxis("top")
        top.set_xticks(list(shown.values()), [str(k) for k in shown])
        top.set_xlabel("active experts per token, k′")
        axes.set_xlabel("active MFLOPs of a token's forward pass")
        axes.set_ylabel(f"held-out loss, nats per {unit}")
        axes.set_title(title, pad=8)
        axes.legend(
            framealpha=0.85, frameon=True, edgecolor="none",
            title="bars: 95 % of the difference to it as trained", title_fontsize=8, alignment="left",
        )  # fmt: skip
        return fig
