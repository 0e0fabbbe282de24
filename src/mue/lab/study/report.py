"""The page of a study and its table, from whatever rows there are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mue.lab.data.spec import described_words
from mue.lab.report.page import Section, text, write_report
from mue.lab.study.figures import colors, headline_figure, valleys_figure
from mue.lab.study.measure import CellMeasures, Compared, Interval, compare, measure
from mue.lab.study.rows import StudyFolder
from mue.lab.study.schedule import Rows, Schedule
from mue.lab.study.spec import BASE, StudySpec
from mue.lab.study.speed_up import SpeedUp, speed_ups
from mue.lab.train.task import task_of
from mue.util.files import write_json

HEADER = (
    "axis", "target", "approach", "tokens per active parameter", "transferred loss", "minimum at (octaves)", "regret", "regret (% of steps)",
    "retuned loss", "runs", "remark",
)  # fmt: skip
POWER = 0.35  # octaves: a drift interval whose half-width is more says too little to be called measured


def study_table(measured: Sequence[CellMeasures]) -> list[list[str]]:
    """One row a cell under :data:`HEADER`; what could not be measured is blank and says why."""
    return [_table_row(m) for m in measured]


def _table_row(m: CellMeasures) -> list[str]:
    target = m.cell.target
    out = [target.axis, target.name, m.cell.approach.name, f"{m.tokens_per_parameter:.3g}"]
    out.append("" if m.mean is None else "diverged" if math.isinf(m.mean) else f"{m.mean:.4f}")
    out.append(_span(m.drift, 2, signed=True) if m.drift else "")
    out.append(_span(m.regret, 4) if m.regret else "")
    out.append(f"{m.regret_steps:.1f}" if m.regret_steps is not None else "")
    out.append(f"{m.attained.value:.4f}" if m.attained else "")
    out.append(f"{sum(len(at) for at in m.losses.values())} of {m.planned}" if m.cell.plan else "")
    out.append(_remark(m))
    return out


def _remark(m: CellMeasures) -> str:
    if m.cell.plan is None:
        return f"refused: {m.cell.refused}"
    if m.valley is None:
        return "" if m.cell.approach.multipliers else "no valley yet"
    if not m.bracketed:
        return "the lowest is at an end of what was tried"
    assert m.drift is not None
    return "" if m.drift.half_width <= POWER else f"without power: ± {m.drift.half_width:.2g} octaves"


def _span(x: Interval, digits: int, *, signed: bool = False) -> str:
    def one(value: float) -> str:
        return "open" if math.isinf(value) else f"{value:{'+' if signed else ''}.{digits}f}"

    return f"{one(x.value)} ({one(x.low)} to {one(x.high)})"


def summary(spec: StudySpec, measured: Sequence[CellMeasures], asked: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """The study's numbers for JSON: what pages and documents quote."""
    reference = next(iter(spec.approaches))
    return {
        "data": asked["data"],
        "cells": [
            {
                "axis": m.cell.target.axis,
                "target": m.cell.target.name,
                "shape": m.cell.target.shape.name,
                "approach": m.cell.approach.name,
                "plan": m.cell.plan.hash if m.cell.plan else None,
                "refused": m.cell.refused or None,
                "tokens_per_active_parameter": round(m.tokens_per_parameter, 2),
                "losses": {f"{k:g}": {str(s): _number(y) for s, y in at.items()} for k, at in m.losses.items()},
                "transferred": None if m.mean is None else _number(m.mean),
                "drift": m.drift.to_list() if m.drift else None,
                "regret": m.regret.to_list() if m.regret else None,
                "regret_percent_of_steps": None if m.regret_steps is None else round(m.regret_steps, 2),
                "retuned": m.attained.to_list() if m.attained else None,
                "bracketed": m.bracketed,
            }
            for m in measured
        ],
        "against": {
            reference: [
                {
                    "axis": c.axis,
                    "target": c.target,
                    "approach": c.approach,
                    "difference": c.difference.to_list(),
                    "seeds": c.seeds,
                }
                for c in compare(measured, reference)
            ]
        },
        "speed_up": [
            {
                "axis": g.axis,
                "approach": g.approach,
                "moe": g.moe,
                "dense": g.dense,
                "factors": [round(f, 3) for f in g.factors],
            }
            for g in speed_ups(measured, rows)
        ],
    }


def _number(x: float) -> float | None:
    return round(x, 6) if math.isfinite(x) else None


def sentences(compared: Sequence[Compared]) -> list[str]:
    """For each approach on how many targets it is better, worse or level with the reference, beyond noise."""
    out = []
    for approach in dict.fromkeys(c.approach for c in compared):
        mine = [c for c in compared if c.approach == approach and c.targets == 1]
        worse = [c for c in mine if c.difference.low > 0]
        better = [c for c in mine if c.difference.high < 0]
        words = f"{approach} against {mine[0].against}, at transferred values, over {len(mine)} targets: higher loss on {len(worse)}"
        if worse:
            most = max(worse, key=lambda c: c.difference.value)
            words += f" (by up to {most.difference.value:.3f}, {most.axis}: {most.target})"
        words += f", lower on {len(better)}"
        if better:
            most = min(better, key=lambda c: c.difference.value)
            words += f" (by up to {-most.difference.value:.3f}, {most.axis}: {most.target})"
        out.append(f"{words}, level within noise on {len(mine) - len(worse) - len(better)}.")
    return out


def study_report(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Write ``report.html``, its pictures and ``study-results.json`` into a study's folder, from whatever rows there are.

    Args:
        others: folders of the same study on other machines, whose rows are taken over first.

    Returns:
        The page's path.

    Raises:
        ValueError: a folder holds no study, or one on other data.
    """
    here = StudyFolder(folder)
    here.merge(others)
    asked, spec, rows = here.asked(), here.spec(), here.rows()
    measured = measure(Schedule(spec, asked["data"]), rows)
    unit = task_of(spec.settings).unit
    colored = colors(list(spec.approaches))
    with_runs = [
        axis
        for axis in spec.axes
        if any(m.losses for m in measured if m.cell.target.axis == axis and m.cell.target.name != BASE)
    ]
    found = summary(spec, measured, asked, rows)
    write_json(folder / "study-results.json", found)
    compared = compare(measured, next(iter(spec.approaches)))
    sections = []
    if with_runs:
        sections.append(
            Section(
                id="headline",
                title="Loss at transferred values",
                texts=[text(s) for s in sentences(compared)],
                figure=headline_figure(measured, with_runs, colored),
                caption="Lines: what a user gets, with the rate that each approach transfers (dots: seeds). Dashes: its rate retuned on the target."
                f" Zero is the best that any approach reached there, retuned. Losses are in {unit}.",
            )
        )
    sections.append(_against_section(compared, measured))
    if gains := speed_ups(measured, rows):
        sections.append(_speed_up_section(gains))
    sections += [
        Section(
            id="valleys-" + "-".join(re.findall(r"\w+", axis)),
            title=f"Valleys: {axis}",
            figure=valleys_figure(measured, axis, colored, unit),
            caption="Every run is a dot; ▼ the minimum of the fitted curve; 1× is the transferred value. ▲ lies above the picture, ✕ diverged.",
        )
        for axis in with_runs
    ]
    sections.append(
        Section(
            id="cells",
            title="Every cell",
            header=HEADER,
            rows=study_table(measured),
            wrap=(len(HEADER) - 1,),
            facts=_facts(asked, rows),
        )
    )
    runs = sum(m.planned for m in measured)
    lead = f"{len(rows)} runs on {described_words(asked['data'])}; {spec.base.name} tuned, {len(spec.axes)} axes, {len(spec.approaches)} approaches."
    cards = [("runs trained", str(len(rows))), ("asked for so far", str(runs)), ("core-hours", f"{_hours(rows):.1f}")]
    return write_report(folder, "Does it transfer?", lead, sections, cards)


def _against_section(compared: Sequence[Compared], measured: Sequence[CellMeasures]) -> Section:
    rows = [[c.axis, c.target, c.approach, _span(c.difference, 4, signed=True), str(c.seeds)] for c in compared]
    reference = compared[0].against if compared else "the first approach"
    diverged = [
        f"{m.cell.approach.name} on {m.cell.target.axis}: {m.cell.target.name}" for m in measured if m.mean == math.inf
    ]
    return Section(
        id="against",
        title=f"Paired with {reference}",
        texts=[
            text(
                f"Loss at transferred values minus that of {reference}, seed by seed; above 0 {reference} is better. The spread of these differences is pooled over each axis."
            ),
            *(
                [
                    text(
                        f"Diverged at the transferred value in at least one seed, so not compared: {'; '.join(diverged)}.",
                        warn=True,
                    )
                ]
                if diverged
                else []
            ),
        ],
        header=("axis", "target", "approach", "difference (95 % interval)", "seeds"),
        rows=rows,
    )


def _speed_up_section(gains: Sequence[SpeedUp]) -> Section:
    rows = [
        [g.axis, g.approach, g.moe, g.dense, f"{g.mean:.2f}×", ", ".join(f"{f:.2f}" for f in g.factors)] for g in gains
    ]
    return Section(
        id="speed-up",
        title="MoE against dense at equal active FLOPs",
        texts=[
            text(
                "Active FLOPs that the dense model spends to its loss at the end of the stable phase, over what the MoE spends to the same loss."
            )
        ],
        header=("axis", "approach", "MoE", "dense", "speed-up", "each seed"),
        rows=rows,
    )


def _hours(rows: Mapping[str, Mapping[str, Any]]) -> float:
    return float(sum(row["seconds"] * row.get("threads", 1) for row in rows.values())) / 3600


def _facts(asked: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    data = asked["data"]
    code = sorted({str(row.get("git")) for row in rows.values()})
    machines = sorted({str(row.get("machine")) for row in rows.values()})
    return [
        ("data", f"{asked['source']}: {described_words(data)}, sha256 {data['hash']}"),
        ("tuned", json.dumps(asked["study"]["tuned"])),
        ("code", ", ".join(code)),
        ("machines", "; ".join(machines)),
    ]
