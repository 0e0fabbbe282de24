"""The pictures of a report: pure functions from results to matplotlib figures, one style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mue.lab.valley import Valley
from mue.plan import render
from mue.plan.plan import PlanData
from mue.rules.table import CELLS, FACTORS

mpl.use("Agg")  # files only: on a machine without a screen another backend fails
INK, GREY, GRID = "#1d2733", "#7b8794", "#e4e8ec"
MUE, DENSE, STANDARD, WARM = "#0b7285", "#e8590c", "#868e96", "#c92a2a"
CYCLE = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#a07000", "#1864ab", "#495057")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",  # outlines: a page looks the same where the font is missing
    "svg.hashsalt": "mue",  # ids are random otherwise, and the same runs would not give the same page
}
BARE: Any = {**STYLE, "axes.grid": False}
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # quicker to draw than a formula
Points = Sequence[tuple[float, float | None]]
"""(log2 of the lr, loss or None where the run diverged)"""


def figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of ``columns`` axes side by side."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(1, columns, squeeze=False, **kwargs)
    return fig, list(axes[0])


def draw_valley(
    axes: Axes, points: Points, valley: Valley | None, color: str, label: str, *, interval: bool = True
) -> None:
    """Draw points, the fitted curve, the minimum and its interval; diverged runs as crosses at the top.

    Args:
        axes: its limits are set already, for an open interval is cut there.
        points: :data:`Points`. valley: through them; None: not fitted.
    """
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    many = len(finite) > 500  # large points would hide the curve
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    axes.plot(xs, ys, "o", color=color, ms=2.5 if many else 4.5, label=label)
    if valley is not None and valley.curve:
        xs = [p.log2_lr for p in valley.used]
        low, high = min(xs), max(xs)
        grid = [low + (high - low) * i / 120 for i in range(121)]
        axes.plot(grid, [valley.predict(x) for x in grid], "-", color=color, lw=1.4)
        if interval:
            left, right = axes.get_xlim()
            a, b = (min(max(x, left), right) for x in valley.interval)
            axes.axvspan(a, b, color=color, alpha=0.10, lw=0)
        axes.plot([valley.minimum], [valley.predict(valley.minimum)], "v", color=color, ms=9, mec="white")
    diverged = [x for x, y in points if y is None or not math.isfinite(y)]
    if diverged:
        axes.plot(
            diverged, [0.97] * len(diverged), "x", color=WARM, transform=axes.get_xaxis_transform(), clip_on=False
        )


def _octaves(axes: Axes, lowest: float, highest: float) -> None:
    axes.set_xlim(lowest - 0.4, highest + 0.4)
    ticks = list(range(math.ceil(lowest - 0.4), math.floor(highest + 0.4) + 1))
    axes.set_xticks(ticks, [f"2{str(t).translate(RAISED)}" for t in ticks])


def _loss_limits(axes: Axes, curves: Sequence[tuple[Points, str]]) -> None:
    """Show the valley, not the cliff: cut far above the lowest loss; ▲ marks what lies above the picture."""
    losses = sorted(y for points, _ in curves for _, y in points if y is not None and math.isfinite(y))
    if not losses:  # every run diverged: crosses alone
        return
    low = losses[0]
    # Four times the median's height, and not less than four times the noise of single runs (about 0.02 nats,
    # docs/LOG.md).
    top = min(losses[-1], low + 4 * max(0.02, losses[len(losses) // 2] - low))
    margin = 0.07 * (top - low) or 0.01
    axes.set_ylim(low - margin, top + 3 * margin)  # room for the legend
    for points, color in curves:
        above = [x for x, y in points if y is not None and y > top + 3 * margin]
        axes.plot(above, [0.985] * len(above), "^", color=color, ms=4.5, transform=axes.get_xaxis_transform())


def sweep_figure(cells: Sequence[Mapping[str, Any]], best: int, unit: str) -> Figure:
    """The sweep: one valley for each weight decay and init std, the winner filled and with its interval.

    Args:
        cells: dictionaries with ``label``, ``points`` (:data:`Points`) and ``valley``. best: which of them won.
        unit: of the loss (``Task.unit``).
    """
    with mpl.rc_context(STYLE):
        fig, (axes,) = figure(6.6, 4.1)
        # The margins are known: with a layout engine matplotlib lays out and draws a figure twice for each file
        # (docs/LOG.md).
        fig.set_layout_engine(None)
        fig.subplots_adjust(0.125, 0.115, 0.985, 0.925)
        xs = [x for cell in cells for x, _ in cell["points"]]
        _octaves(axes, min(xs), max(xs))
        others = [i for i in range(len(cells)) if i != best]
        colors = {best: MUE} | {i: CYCLE[1:][n % (len(CYCLE) - 1)] for n, i in enumerate(others)}
        for i in [*others, best]:
            draw_valley(axes, cells[i]["points"], cells[i]["valley"], colors[i], cells[i]["label"], interval=i == best)
        _loss_limits(axes, [(cells[i]["points"], colors[i]) for i in colors])
        axes.set_xlabel("learning rate of the dense base")
        axes.set_ylabel(f"validation loss, {unit}")
        axes.set_title("Dense base: ▼ fitted minima, band the 95 % interval of the best")
        if len(cells) > 1:
            axes.legend(
                loc="upper center",
                ncols=2,
                title="weight decay, init std",
                title_fontsize=8,
                framealpha=0.85,
                frameon=True,
                edgecolor="none",
            )
        return fig


def check_figure(curves: Sequence[Mapping[str, Any]], unit: str) -> Figure:
    """Where each rule's valley lies against the transferred value, multiplier 1.

    Args:
        curves: dictionaries with ``label``, ``points`` over log2(multiplier), ``valley`` and ``color``.
        unit: of the loss (``Task.unit``).
    """
    with mpl.rc_context(STYLE):
        fig, (axes,) = figure(6.6, 4.1)
        xs = [x for curve in curves for x, _ in curve["points"]]
        axes.set_xlim(min(xs) - 0.4, max(xs) + 0.4)
        ticks = sorted(set(xs))
        axes.set_xticks(ticks, [f"{2.0**t:g}×" for t in ticks])
        for curve in curves:
            draw_valley(axes, curve["points"], curve["valley"], curve["color"], curve["label"])
        axes.axvline(0, color=INK, lw=1, ls=":")
        _loss_limits(axes, [(curve["points"], curve["color"]) for curve in curves])
        axes.annotate(
            "transferred value",
            (0, 0),
            xycoords=("data", "axes fraction"),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8.5,
        )
        axes.set_xlabel("learning rate multiplier on the MoE")
        axes.set_ylabel(f"validation loss, {unit}")
        axes.set_title("Valley check: ▼ fitted minimum, band 95 % interval")
        axes.legend(loc="upper center", framealpha=0.85, frameon=True, edgecolor="none")
        return fig


def loss_figure(runs: Sequence[Mapping[str, Any]], unit: str) -> Figure:
    """Training loss (smoothed) and validation loss over tokens and over active FLOPs.

    Args:
        runs: dictionaries with ``label``, ``color``, ``metrics`` (rows), ``flops_per_token`` and, where colours do not suffice, ``style``.
        unit: of the loss (``Task.unit``).
    """
    with mpl.rc_context(STYLE):
        fig, (left, right) = figure(9.6, 3.9, 2, sharey=True)
        highest = lowest = None
        for run in runs:
            rows = [row for row in run["metrics"] if row["loss"] is not None and math.isfinite(row["loss"])]
            if not rows:  # it diverged at its first step
                continue
            tokens = [row["tokens"] for row in rows]
            loss = _smooth([row["loss"] for row in rows])
            held = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
            for axes, scale in ((left, 1e-3), (right, run["flops_per_token"] / 1e12)):
                axes.plot(
                    [t * scale for t in tokens], loss, run.get("style", "-"), color=run["color"], lw=1.5, alpha=0.55
                )
                axes.plot(
                    [t * scale for t, _ in held],
                    [v for _, v in held],
                    run.get("style", "-"),
                    marker="o",
                    color=run["color"],
                    lw=1,
                    ms=4,
                    label=run["label"],
                )
            # The first twelfth is the fall from guessing: in the picture, it would leave the rest flat.
            start = loss[min(len(loss) - 1, max(1, len(loss) // 12))]
            highest, lowest = max(highest or start, start), min(lowest or 99.0, *[v for _, v in held], *loss)
        left.set_ylim((lowest or 0) - 0.08, (highest or 6) + 0.1)
        left.set_xlabel("training tokens, thousands")
        right.set_xlabel("training compute, active TFLOPs")
        left.set_ylabel(f"loss, {unit}")
        left.set_title("Same tokens")
        right.set_title("Same active compute")
        if left.lines:
            left.legend(title="dots: validation, line: training", title_fontsize=8)
        return fig


def _smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential average with bias correction, as of Adam's moments (1412.6980): it does not start at zero."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def plan_figure(plan: PlanData) -> Figure:
    """The plan's table as a picture."""
    header, rows = render.table(plan)
    factors = [title for cell, title in FACTORS.items() if cell != "eps"]  # no room for the fourth
    keep = [header.index(title) for title in ("role", "tensors", *CELLS.values(), *factors)]
    with mpl.rc_context(BARE):
        fig, (axes,) = figure(12, 0.6 + 0.29 * len(rows))
        axes.axis("off")
        axes.set_title(f"{plan.rule.name}: {plan.target.name}    plan {plan.hash}", pad=4)
        table = axes.table(
            [[row[i] for i in keep] for row in rows],
            colLabels=[header[i] for i in keep],
            colWidths=[0.1, 0.055, 0.075, 0.075, 0.085, 0.075, 0.16, 0.19, 0.185],
            cellLoc="left",
            colLoc="left",
            bbox=Bbox.unit(),
        )
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        for (line, _), cell in table.get_celld().items():
            cell.set_edgecolor(GRID)
            cell.set_linewidth(0.5)
            cell.set_facecolor("white" if line % 2 else "#f6f8fa")
            if line == 0:
                cell.set_text_props(weight="bold")
        return fig
