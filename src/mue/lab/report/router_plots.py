"""The pictures of a run's routers: pure functions from its rows and matrices to figures, in the style of all others.

Layers are named by their place in the model. Where there are more than :data:`PANELS`, as many are drawn, spread over the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mue.lab.report.plots import BARE, CYCLE, GREY, GRID, INK, STYLE, figure

PANELS = 6
Rows = Sequence[Mapping[str, Any]]
Layers = Sequence[int]
"""Of each block with experts, the layer that it is in the model."""


def drawn(layers: int) -> list[int]:
    """The places of the layers that are drawn: all, or :data:`PANELS` from the first to the last."""
    if layers <= PANELS:
        return list(range(layers))
    return [round(i * (layers - 1) / (PANELS - 1)) for i in range(PANELS)]


def _cmap() -> mpl.colors.Colormap:
    """Orange above, white at, purple below what is expected; grey where there is nothing."""
    return mpl.colormaps["PuOr_r"].with_extremes(bad=GRID)


def load_map(panel: Axes, table: Any, **more: Any) -> Any:
    """A table of loads over their fair share, drawn."""
    return panel.imshow(table, aspect="auto", cmap=_cmap(), vmin=0, vmax=2, interpolation="nearest", **more)


def load_figure(rows: Rows, layers: Layers) -> Figure:
    """Share of each expert over training, one panel for each layer; white is balanced (1/N).

    Args:
        rows: of metrics; those with ``load``, of ``tokens``.
    """
    rows = [row for row in rows if row.get("load")]
    places = drawn(len(rows[0]["load"]))
    with mpl.rc_context(BARE):
        fig, axes = figure(9.6, 2.9, len(places))
        tokens = [row["tokens"] / 1e3 for row in rows]
        for place, panel in zip(places, axes, strict=True):
            experts = len(rows[0]["load"][place])
            table = [[row["load"][place][n] * experts for row in rows] for n in range(experts)]
            extent = (tokens[0], max(tokens[-1], tokens[0] + 1e-3), experts - 0.5, -0.5)
            image = load_map(panel, table, extent=extent)
            panel.set_title(f"layer {layers[place]}", fontsize=9)
            panel.set_xlabel("thousand tokens", fontsize=8)
        axes[0].set_ylabel("expert")
        fig.colorbar(image, ax=axes, label="load ÷ fair share", shrink=0.9)
        return fig


def over_time_figure(rows: Rows, layers: Layers, plan: Sequence[Mapping[str, float]] | None) -> Figure:
    """MaxVio, entropy, m1 and F over training, a line for each layer; dots where a reading was taken.

    Args:
        rows: of metrics; those with ``load``, and of them those with ``routers``.
        plan: of each layer, what the plan assumed (m1, F); None where that is not known.
    """
    measured = [row for row in rows if row.get("routers")]
    places = drawn(len(layers))

    def reading(name: str, scale: Callable[[int], float]) -> Callable[[int], list[tuple[float, float | None]]]:
        def points(place: int) -> list[tuple[float, float | None]]:
            found = [(row["tokens"] / 1e3, row["routers"][place][name]) for row in measured]
            return [(x, None if y is None else y / scale(place)) for x, y in found]

        return points

    def vio(place: int) -> list[tuple[float, float | None]]:
        loads = [(row["tokens"] / 1e3, row["load"][place]) for row in rows if row.get("load")]
        return [(x, max(shares) * len(shares) - 1) for x, shares in loads if any(shares)]  # shares sum to 1

    def logarithm(place: int) -> float:
        return math.log(max(2, len(measured[0]["routers"][place]["share"])))

    def planned(name: str) -> Callable[[int], float]:
        return lambda place: plan[place][name] if plan else 1.0

    panels: list[tuple[str, Callable[[int], list[tuple[float, float | None]]], str, float | None]] = [
        ("MaxVio of the batch", vio, "", 0.0),
        ("router entropy ÷ log N", reading("entropy", logarithm), ".-", None),
        ("m1 ÷ the plan's" if plan else "m1", reading("m1", planned("m1")), "o-", 1.0 if plan else None),
        ("F ÷ the plan's" if plan else "F = a·m2/m1²", reading("F", planned("F")), "o-", 1.0 if plan else None),
    ]
    with mpl.rc_context(STYLE):
        fig, axes = figure(9.6, 2.8, len(panels))
        for panel, (title, points, style, reference) in zip(axes, panels, strict=True):
            for n, place in enumerate(places):
                xy = [(x, y) for x, y in points(place) if y is not None and math.isfinite(y)]
                color = CYCLE[n % len(CYCLE)]
                panel.plot([x for x, _ in xy], [y for _, y in xy], style, color=color, lw=1.2, ms=3.5, label=f"layer {layers[place]}")  # fmt: skip
            if reference is not None:
                panel.axhline(reference, color=INK, lw=0.9, ls=":")
            if not any(len(line.get_xdata()) for line in panel.lines[: len(places)]):  # type: ignore[arg-type]
                _none(panel, "not to be had\nof this router")
            _room(panel)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("thousand tokens", fontsize=8)
        axes[0].legend(fontsize=7)
        return fig


def _room(axes: Axes) -> None:
    """At least a twentieth of its height for a curve: a constant one would else fill the axis with rounding."""
    low, high = axes.get_ylim()
    least = 0.05 * max(abs(low), abs(high), 1e-6)
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least, middle + least)


def _none(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color=GREY, fontsize=9)


def pairs_figure(seen: Sequence[Mapping[str, Any]], layers: Layers) -> Figure | None:
    """Which experts go together, and whose down projections are alike: a line of panels each, a column for each layer.

    A line that no layer has is left out; None where that is both.

    Args:
        seen: ``layers`` of ``routers.json``.
    """
    places = drawn(len(seen))
    alike = [seen[place]["overlap"] for place in places]
    widest = max([0.05, *(abs(x) for m in alike for i, row in enumerate(m or []) for j, x in enumerate(row) if i != j)])
    lines = [([coactive(seen[place]) for place in places], 0.0, 2.0, "together ÷ by chance"), (alike, -widest, widest, "cosine of down")]  # fmt: skip
    lines = [line for line in lines if any(matrix is not None for matrix in line[0])]
    if not lines:
        return None
    with mpl.rc_context(BARE):
        fig = Figure(figsize=(9.6, 2.3 * len(lines)), layout="constrained")
        table = fig.subplots(len(lines), len(places), squeeze=False)
        for panels, (matrices, low, high, label) in zip(table, lines, strict=True):
            for panel, place, matrix in zip(panels, places, matrices, strict=True):
                panel.set_title(f"layer {layers[place]}", fontsize=9)
                if matrix is None:
                    _none(panel, "one active expert" if label.startswith("together") else "not to be had")
                    panel.set_axis_off()
                    continue
                shown = [[math.nan if i == j else x for j, x in enumerate(row)] for i, row in enumerate(matrix)]
                image = panel.imshow(shown, cmap=_cmap(), vmin=low, vmax=high, interpolation="nearest")
                panel.tick_params(labelsize=7)
            fig.colorbar(image, ax=list(panels), label=label, shrink=0.9)
        return fig


def coactive(layer: Mapping[str, Any]) -> list[list[float]] | None:
    """P(j active | i active) over what a choice gives that is even and independent, E[a(a-1)]/((N-1)·E[a]); None where no two are
    ever active. An expert that nobody chose has no row: NaN.
    """
    count, experts, tokens = layer["coactivation"], layer["experts"], layer["active_counts"]
    singles = sum(a * n for a, n in enumerate(tokens))
    pairs = sum(a * (a - 1) * n for a, n in enumerate(tokens))
    if not pairs or experts < 2:
        return None
    chance = pairs / singles / (experts - 1)
    return [[n / row[i] / chance if row[i] else math.nan for n in row] for i, row in enumerate(count)]


def specialisation_figure(found: Mapping[str, Any], layers: Layers) -> Figure:
    """How much more of a class of tokens an expert gets than of all tokens, one panel for each layer.

    Args:
        found: ``routers.json``.
    """
    places = [p for p in drawn(len(found["layers"])) if found["layers"][p]["specialisation"] is not None]
    names = [f"{name} ({count:,})" for name, count in zip(found["classes"], found["class_tokens"], strict=True)]
    with mpl.rc_context(BARE):
        fig, axes = figure(9.6, 2.2, len(places))
        for n, (panel, place) in enumerate(zip(axes, places, strict=True)):
            image = panel.imshow(lift(found, place), aspect="auto", cmap=_cmap(), vmin=-2, vmax=2, interpolation="nearest")  # fmt: skip
            panel.set_yticks(range(len(names)), names if n == 0 else [""] * len(names), fontsize=8)
            panel.set_title(f"layer {layers[place]}", fontsize=9)
            panel.set_xlabel("expert", fontsize=8)
        bar = fig.colorbar(image, ax=axes, shrink=0.95, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼×", "½×", "as many", "2×", "4×"], fontsize=8)
        return fig


def lift(found: Mapping[str, Any], place: int) -> list[list[float]]:
    """log2 of an expert's share of a class over its share of all tokens, cut at ±6; NaN where either has no token."""
    layer = found["layers"][place]
    of_all = [layer["coactivation"][n][n] / found["tokens"] for n in range(layer["experts"])]
    return [
        [
            math.log2(max(count / tokens / share, 2.0**-6)) if tokens and share else math.nan
            for count, share in zip(row, of_all, strict=True)
        ]
        for row, tokens in zip(layer["specialisation"], found["class_tokens"], strict=True)
    ]


def active_figure(seen: Sequence[Mapping[str, Any]], layers: Layers, plan: Sequence[float] | None) -> Figure:
    """How many experts the tokens of each layer have: their distribution, the mean (dot) and what was planned (dotted).

    Args:
        seen: ``layers`` of ``routers.json``. plan: a of each layer.
    """
    most = max(len(layer["active_counts"]) for layer in seen)
    with mpl.rc_context(BARE):
        fig, (axes,) = figure(9.6, min(6.0, 1.4 + 0.3 * len(seen)))
        table = []
        for layer in seen:
            tokens = max(1, sum(layer["active_counts"]))
            shares = [count / tokens for count in layer["active_counts"]]
            table.append(shares + [0.0] * (most - len(shares)))
        image = axes.imshow(table, aspect="auto", cmap="Greens", vmin=0, vmax=1, interpolation="nearest")
        means = [sum(n * share for n, share in enumerate(row)) for row in table]
        axes.plot(means, range(len(seen)), "o", color=CYCLE[1], ms=5, label="mean")
        if plan:
            axes.plot(plan, range(len(seen)), ":", color=INK, lw=1.2, marker="|", ms=9, label="planned")
        axes.set_yticks(range(len(seen)), [f"layer {layer}" for layer in layers], fontsize=8)
        axes.set_xlabel("active experts of a token")
        axes.legend(loc="upper right", fontsize=8)
        fig.colorbar(image, ax=axes, label="share of tokens")
        return fig
