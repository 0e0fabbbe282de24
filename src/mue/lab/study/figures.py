"""The pictures of a study: the headline (loss at transferred values) and the valleys of each axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mue.lab.report.plots import CYCLE, GREY, INK, MUE, STANDARD, STYLE, WARM, draw_valley
from mue.lab.study.measure import CellMeasures
from mue.lab.study.spec import BASE, octave

# The same colour for the same approach on every picture; ours and the plain one keep the house's.
_FIXED = {"complete-mue": MUE, "standard": STANDARD}


def colors(approaches: Sequence[str]) -> dict[str, str]:
    """Approach → colour, the same for the same list."""
    free = [c for c in CYCLE if c not in _FIXED.values()]
    others = [a for a in approaches if a not in _FIXED]
    return {a: _FIXED.get(a) or free[others.index(a) % len(free)] for a in approaches}


def _markers(colored: Mapping[str, str]) -> dict[str, str]:
    """Approach → marker: another one for each that comes to a colour that is taken."""
    seen: dict[str, int] = {}
    out = {}
    for approach, color in colored.items():
        out[approach] = "os^Dv"[seen.get(color, 0) % 5]
        seen[color] = seen.get(color, 0) + 1
    return out


def headline_figure(measured: Sequence[CellMeasures], axes: Sequence[str], colored: Mapping[str, str]) -> Figure:
    """One panel an axis: how far above the best loss that anything reached each approach lies, at its transferred values.

    Large marks are transferred values, each seed a small dot; thin dashes are what the approach reaches with its rate retuned on the
    target. All against the best fitted minimum of any approach on that target, so that targets of different size share a scale.

    Args:
        measured: all cells. axes: which of their axes, in order. colored: approach → colour.
    """
    with mpl.rc_context(STYLE):
        columns = 2 if len(axes) == 4 else min(3, len(axes))
        lines = -(-len(axes) // columns)
        fig = Figure(figsize=(3.9 * columns + 0.6, 3.2 * lines + 0.7), layout="constrained")
        panels = fig.subplots(lines, columns, squeeze=False)
        for panel in panels.flat[len(axes) :]:
            panel.axis("off")
        for panel, axis in zip(panels.flat, axes, strict=False):
            _headline_panel(panel, axis, [m for m in measured if m.cell.target.axis == axis], colored)
        _legend(fig, panels.flat)
        fig.supylabel("loss above the best that any approach reached, retuned", fontsize=9, color=INK)
        return fig


def _legend(fig: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    shown: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    fig.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=min(5, max(1, len(shown))))


def _headline_panel(panel: Axes, axis: str, cells: Sequence[CellMeasures], colored: Mapping[str, str]) -> None:
    targets = list(dict.fromkeys(m.cell.target.name for m in cells))
    present = [a for a in colored if any(m.cell.approach.name == a for m in cells)]
    markers = _markers(colored)
    top = 0.0
    floor = {t: min((_lowest(m) for m in cells if m.cell.target.name == t), default=math.inf) for t in targets}
    for i, approach in enumerate(present):
        shift = (i - (len(present) - 1) / 2) * min(0.12, 0.6 / max(1, len(present)))
        xs, ys, retuned = [], [], []
        for x, target in enumerate(targets):
            for m in cells:
                if m.cell.target.name != target or m.cell.approach.name != approach or m.mean is None:
                    continue
                if not math.isfinite(m.mean):
                    panel.plot([x + shift], [0.97], "x", color=colored[approach], transform=panel.get_xaxis_transform())
                    continue
                xs.append(x + shift)
                ys.append(m.mean - floor[target])
                retuned.append(_lowest(m) - floor[target])
                each = [y - floor[target] for y in m.transferred.values()]
                panel.plot([x + shift] * len(each), each, ".", color=colored[approach], ms=3, alpha=0.6)
                top = max(top, ys[-1])
        panel.plot(xs, ys, markers[approach] + "-", color=colored[approach], ms=5.5, lw=1.3, label=approach)
        panel.plot(xs, retuned, "--", color=colored[approach], lw=0.8, alpha=0.8)
    panel.set_title(axis)
    panel.set_xticks(range(len(targets)), [_wrapped(t) for t in targets], fontsize=7.5 if len(targets) < 5 else 6)
    panel.set_xlim(-0.5, len(targets) - 0.5)
    panel.set_ylim(-0.05 * top - 0.002, 1.12 * top + 0.004)
    panel.axhline(0, color=GREY, lw=0.6)


def _lowest(m: CellMeasures) -> float:
    """The lowest that is known of a cell: its curve's minimum, or its lowest mean over seeds."""
    means = [sum(at.values()) / len(at) for at in m.losses.values()]
    return min([m.attained.value] if m.attained else means, default=math.inf)


def _wrapped(name: str) -> str:
    """A target's name under a panel: a line for each change, and a MoE's notation without the word that it needs none of."""
    return name.removeprefix("moe ").replace(", ", "\n")


def valleys_figure(measured: Sequence[CellMeasures], axis: str, colored: Mapping[str, str], unit: str) -> Figure:
    """One panel a target: the valley of each approach over the multiplier of its transferred rate.

    Args:
        measured: all cells. unit: of the loss.
    """
    cells = [m for m in measured if m.cell.target.axis == axis and any(m.losses.values())]
    targets = list(dict.fromkeys(m.cell.target.name for m in cells))
    with mpl.rc_context(STYLE):
        columns = 3 if len(targets) <= 3 else 4  # one panel alone would fill the page
        lines = max(1, -(-len(targets) // columns))
        fig = Figure(figsize=(3.0 * columns + 0.5, 2.9 * lines + 0.6), layout="constrained")
        panels = fig.subplots(lines, columns, squeeze=False)
        for panel in panels.flat[len(targets) :]:
            panel.axis("off")
        for panel, target in zip(panels.flat, targets, strict=False):
            here = [m for m in cells if m.cell.target.name == target]
            xs = [octave(x) for m in here for x in m.losses]
            panel.set_xlim(min(xs) - 0.4, max(xs) + 0.4)
            ticks = range(math.ceil(min(xs)), math.floor(max(xs)) + 1)
            panel.set_xticks(list(ticks), [f"{2.0**t:g}×" for t in ticks])
            for m in here:
                points = [
                    (octave(x), y if math.isfinite(y) else None) for x, at in m.losses.items() for y in at.values()
                ]
                draw_valley(
                    panel, points, m.valley, colored[m.cell.approach.name], m.cell.approach.name, interval=False
                )
            panel.axvline(0, color=INK, lw=1, ls=":")
            _cut(panel, here)
            panel.set_title(_wrapped(target) if target != BASE else "the base itself", fontsize=9)
        _legend(fig, panels.flat)
        for panel in panels[-1]:
            panel.set_xlabel("multiplier of the transferred rate", fontsize=8)
        fig.supylabel(f"validation loss, {unit}", fontsize=9, color=INK)
        return fig


def _cut(panel: Axes, cells: Sequence[CellMeasures]) -> None:
    """Show the valleys, not the cliffs: what lies far above is a mark at the top."""
    losses = sorted(y for m in cells for at in m.losses.values() for y in at.values() if math.isfinite(y))
    if not losses:
        return
    low = losses[0]
    top = min(losses[-1], low + 4 * max(0.02, losses[len(losses) // 2] - low))
    panel.set_ylim(low - 0.06 * (top - low) - 0.002, top + 0.1 * (top - low) + 0.002)
    above = [
        octave(x) for m in cells for x, at in m.losses.items() for y in at.values() if math.isfinite(y) and y > top
    ]
    panel.plot(above, [0.985] * len(above), "^", color=WARM, ms=4, transform=panel.get_xaxis_transform())
