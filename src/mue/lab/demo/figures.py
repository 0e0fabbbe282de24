"""The demo's first picture: what a user gets, and where each approach's valley lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mue.lab.report.plots import CYCLE, INK, STYLE, WARM, draw_valley


def outcome_figure(
    gained: Sequence[Mapping[str, Any]], valleys: Sequence[Mapping[str, Any]], dense: float | None, unit: str
) -> Figure:
    """Left the loss at the values that each approach gives, right the loss around them.

    Args:
        gained: dictionaries with ``label``, ``losses`` (of each seed, None where it diverged) and ``color``.
        valleys: as :func:`mue.lab.report.plots.check_figure` takes them. dense: loss of a dense model of equal active FLOPs.
        unit: of the loss.
    """
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 4.0), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.15), sharey=True)
        seen = [y for one in gained for y in one["losses"] if y is not None]
        seen += [y for one in valleys for _, y in one["points"] if y is not None]
        for place, one in enumerate(gained):
            losses = [y for y in one["losses"] if y is not None]
            if losses:
                mean = sum(losses) / len(losses)
                left.plot(
                    [place - 0.28, place + 0.28], [mean, mean], "-", color=one["color"], lw=3, solid_capstyle="butt"
                )
                left.annotate(f"{mean:.3f}", (place + 0.32, mean), va="center", fontsize=8.5, color=INK)
                left.plot(
                    [place + 0.07 * (i - (len(losses) - 1) / 2) for i in range(len(losses))],
                    losses,
                    "o",
                    color=one["color"],
                    ms=6,
                )
            if len(losses) < len(one["losses"]):
                left.plot([place], [0.97], "x", color=WARM, transform=left.get_xaxis_transform())
        if dense is not None:
            seen.append(dense)
            left.axhline(dense, color=CYCLE[2], lw=1.2, ls="--")
            left.annotate(
                "dense, equal active FLOPs",
                (len(gained) - 0.45, dense),
                ha="right",
                va="bottom",
                fontsize=8,
                color=CYCLE[2],
            )
        left.set_xticks(range(len(gained)), [_two_lines(one["label"]) for one in gained], fontsize=8.5)
        left.set_xlim(-0.5, len(gained) - 0.4)
        if seen:
            margin = 0.08 * (max(seen) - min(seen)) + 0.004
            left.set_ylim(min(seen) - margin, max(seen) + 2.5 * margin)
        left.set_ylabel(f"validation loss, {unit}")
        left.set_title("Transferred, nothing retuned")
        xs = sorted({x for one in valleys for x, _ in one["points"]})
        right.set_xlim(min(xs) - 0.4, max(xs) + 0.4)
        right.set_xticks(xs, [f"{2.0**x:g}×" for x in xs])
        for one in valleys:
            draw_valley(right, one["points"], one["valley"], one["color"], one["label"], interval=False)
        right.axvline(0, color=INK, lw=1, ls=":")
        right.set_xlabel("multiplier of the transferred learning rate")
        right.set_title("And around it")
        right.legend(loc="upper center", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
        return fig


def _two_lines(label: str) -> str:
    """A label broken near its middle."""
    words = label.split()
    half = max(1, (len(words) + 1) // 2)
    return " ".join(words[:half]) + ("\n" + " ".join(words[half:]) if words[half:] else "")
