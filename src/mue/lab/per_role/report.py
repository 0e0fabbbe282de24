"""The report of a per-role search, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mue.lab.report import plots
from mue.lab.report.page import Section, text, write_report
from mue.lab.sweep.state import RESULT_FILE
from mue.lab.train.run import Settings
from mue.lab.train.task import task_of
from mue.util.text import number


def roles_report(folder: Path) -> Path:
    """Write ``folder/report.html`` and its picture.

    Returns:
        The page's path.

    Raises:
        ValueError: the search has not ended.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no finished search: run mue tune-roles with --out {folder} first")
    result = json.loads(path.read_text(encoding="utf-8"))
    return write_report(folder, "Per-role tuning of the base", result["verdict"], roles_sections(result))


def roles_sections(result: Mapping[str, Any]) -> list[Section]:
    """What each multiplier bought, the whole against one global value, and the rounds that led there."""
    shape, run = result["identity"]["base"], result["identity"]["training"]
    sections = [
        Section(
            id="roles",
            title="What each multiplier bought",
            texts=[
                text(
                    f"{result['runs']} runs of the dense base (width {shape['width']}, {shape['layers']} layers),"
                    f" {run['steps']} steps of {run['batch']:,} tokens each; {len(result['coordinates'])} multipliers were tried."
                ),
                text(result["verdict"] + ".", warn=not (result["confirmed"] or {}).get("holds")),
            ],
        )
    ]
    bought = [row for row in result["multipliers"] if row["gain"] is not None]
    unit = task_of(Settings(**result["identity"]["settings"])).unit
    if bought:
        sections[0].figure = bought_figure(bought, unit)
        sections[0].caption = (
            f"Validation loss saved by each multiplier, in {unit}: its mean over half of the others on and half off, on seeds the"
            " search had not seen, with simultaneous intervals. Grey: dropped again, for it bought nothing."
        )
        sections[0].header = ["multiplier", "×", f"bought ({unit})", "interval", "kept"]
        sections[0].rows = [
            [r["name"], number(r["times"]), f"{r['gain']:+.4f}", _interval(r), "yes" if r["kept"] else "no"]
            for r in bought
        ]
    if result["confirmed"]:
        sections.append(_confirmation(result["confirmed"], unit))
    sections.append(_rounds(result, unit))
    return sections


def _confirmation(confirmed: Mapping[str, Any], unit: str) -> Section:
    """Each set of tuned values with its losses, seed by seed, and the two gains that decide."""
    arms = {arm: [x for x in losses if x is not None] for arm, losses in confirmed["losses"].items()}
    rows = [
        [arm, f"{sum(xs) / len(xs):.4f}" if xs else "diverged", ", ".join(f"{x:.4f}" for x in xs)]
        for arm, xs in arms.items()
    ]
    facts = [
        ("gain on the base as it was", _gain(confirmed["gain"], unit)),
        (f"gain on {confirmed['best']}", _gain(confirmed["gain_on_best"], unit)),
    ]
    return Section(
        id="confirmation",
        title="Against one global value, on fresh seeds",
        facts=facts,
        header=["tuned values", "mean loss", "each seed"],
        rows=rows,
        wrap=(2,),
    )


def _rounds(result: Mapping[str, Any], unit: str) -> Section:
    """The slopes of every coordinate, round by round, and the joint steps."""
    rounds = result["rounds"]
    facts = []
    for i, made in enumerate(rounds):
        taken = next((g for g in made["tried"] if g["point"] == made["taken"]), None)
        best = taken or max(made["tried"], key=lambda g: g["gain"] or float("-inf"), default=None)
        what = (
            "nothing stood out of the noise"
            if best is None
            else f"{'taken' if taken else 'not taken'}: {_gain(best, unit)}"
        )
        facts.append((f"round {i + 1}, ± {made['step']:g} octaves", f"{what}; noise of a slope {made['noise']:.4f}"))
    rows = [[label, *(f"{made['slopes'][i]:+.4f}" for made in rounds)] for i, label in enumerate(result["coordinates"])]
    return Section(
        id="rounds",
        title="The search",
        facts=facts,
        header=["multiplier", *(f"slope, round {i + 1}" for i in range(len(rounds)))],
        rows=rows,
        fold="every slope (loss for one step up)",
    )


def _gain(gain: Mapping[str, Any], unit: str) -> str:
    return (
        "diverged" if gain["gain"] is None else f"{gain['gain']:+.4f} {unit} ({_interval(gain)}, {gain['seeds']} seeds)"
    )


def _interval(gain: Mapping[str, Any]) -> str:
    return " … ".join("?" if x is None else f"{x:+.4f}" for x in (gain["low"], gain["high"]))


def bought_figure(rows: Sequence[Mapping[str, Any]], unit: str) -> Figure:
    """One line for each multiplier, the best on top: its share of the gain and the interval, in ``unit`` of the loss."""
    rows = sorted(rows, key=lambda r: r["gain"])
    with mpl.rc_context(plots.STYLE):
        fig, (axes,) = plots.figure(6.6, 0.9 + 0.24 * len(rows))
        for y, row in enumerate(rows):
            color = plots.MUE if row["kept"] else plots.STANDARD
            if row["low"] is not None and row["high"] is not None:
                axes.plot([row["low"], row["high"]], [y, y], color=color, lw=1.6)
            axes.plot([row["gain"]], [y], "o", color=color, ms=5)
        axes.axvline(0, color=plots.INK, lw=0.8)
        axes.set_yticks(range(len(rows)), [f"{r['name']} × {number(r['times'])}" for r in rows])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"validation loss saved, {unit}")
        return fig
