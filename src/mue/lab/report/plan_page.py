"""A plan as a page: its values with what each rests on, and its factors as pictures over width, depth, experts and the run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mue.lab.report import plots
from mue.lab.report.page import Panel, Section, page, text
from mue.plan import render
from mue.plan.along import FORWARD, Along, Curve, along
from mue.plan.defaults import differing
from mue.plan.plan import PlanData
from mue.rules.roles import ROLES
from mue.rules.table import AUTHORS_CODE, CELLS, FIELDS, INFERRED, MARKS, NOT_GIVEN, PUBLISHED
from mue.util.files import write_text
from mue.util.text import number

# Class of a cell in the template → what it means. A letter stands in each cell as well: colours alone tell not everybody.
LEGEND = {
    "published": (PUBLISHED, "published: the rule's own paper has it"),
    "code": (AUTHORS_CODE, "authors' code: not in the paper"),
    "inferred": (INFERRED, "inferred: derived or measured, see the source"),
    "unknown": (NOT_GIVEN, "not given: as tuned"),
}
_CLASSES = {MARKS[mark]: name for name, (mark, _) in LEGEND.items()}
_COLORS = {"lr": plots.MUE, "init_std": plots.DENSE, "weight_decay": "#5f3dc4", FORWARD: plots.GREY}
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_FORWARD_STYLES = _STYLES[1:]  # never a whole line: they often lie on a rate's, which is then seen between the dashes


def plan_page(plan: PlanData, path: Path) -> Path:
    """Write a plan as one self-contained HTML file.

    Args:
        path: of the file; its folder is made.

    Returns:
        The path.
    """
    base = plan.inputs.base
    tuned = base.target.name if isinstance(base, PlanData) else base.name
    lead = f"from {tuned} by {plan.rule.name}; plan {render.known_by(plan)}"
    cards = [
        ("parameters", f"{plan.target.parameters:,}"),
        ("of them active", f"{plan.target.active_parameters:,}"),
        ("output multiplier A", " / ".join(dict.fromkeys(number(b.output_multiplier) for b in plan.blocks))),
        ("route scale R", " / ".join(dict.fromkeys(number(b.route_scale) for b in plan.blocks))),
    ]
    values, factors = plan_sections(plan)
    values.facts, facts = [], values.facts
    values.texts = [text(line, warn=True) for line in differing(plan.inputs)]
    about = Section(id="about", title="What it follows from", facts=facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(plan.target.name, lead, [values, pictures_section(plan), factors, about], cards))
    return path


def plan_sections(plan: PlanData) -> list[Section]:
    """The plan: header and values, each cell marked by what it rests on; then the factors as formulas, which most roles share."""
    (columns, rows), (of, factors) = render.split(plan)
    marks, source = columns.index("marks"), columns.index("source")
    first = columns.index(CELLS[FIELDS[0]])
    numbers = range(first, first + len(FIELDS))
    kept = [i for i in range(len(columns)) if i != marks]
    tags = []
    for row in rows:
        letters = dict(zip(numbers, row[marks].split(), strict=True))
        tags.append([_CLASSES.get(letters.get(i, ""), "") for i in kept])
    used = {tag for row in tags for tag in row}
    values = Section(
        id="plan",
        title="The plan: every parameter of the target",
        facts=render.header(plan),
        figure=plots.plan_figure(plan),
        header=[columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in rows],
        wrap=(kept.index(source),),
        tags=tags,
        legend=[(tag, MARKS[mark], words) for tag, (mark, words) in LEGEND.items() if tag in used],
        in_page="",
    )
    return [
        values,
        Section(id="factors", title="The plan's factors on the base's values", header=of, rows=factors, wrap=(2,)),
    ]


def pictures_section(plan: PlanData) -> Section:
    """Every axis that the target is on as a picture of the factors that move with it."""
    axes = along(plan)
    words = (
        "Each picture changes one number of the target and plans it again from the same base: what a role's tuned value is"
        " multiplied by, on logarithmic axes. ● is this plan's target. What is not drawn does not move along that axis."
    )
    notes = [text(f"No answer further along {a.name}: {a.refused}", warn=True) for a in axes if a.refused]
    drawn = [a for a in axes if any(c.moves for c in a.curves)]
    still = [a.name for a in axes if a not in drawn and len(a.x) > 1]
    if still:
        notes.append(text(f"No value moves with {' or '.join(still)}."))
    if plan.training is None:
        notes.append(text("Batch and duration: no training tables were given, so nothing of them is scaled."))
    return Section(
        id="axes",
        title="How the factors move",
        texts=[text(words), *notes],
        panels=[Panel(axis_figure(a), a.means) for a in drawn],
    )


def axis_figure(axis: Along) -> Figure:
    """One axis: a line for each distinct factor that moves, small enough to be read on a phone.

    Args:
        axis: with at least one curve that moves.
    """
    moving = sorted((c for c in axis.curves if c.moves), key=lambda c: list(_COLORS).index(c.of))
    labels = [f"{_of(c)} {roles_in_words(c.roles, axis.curves)}" for c in moving]
    lines = [_wrapped(label) for label in labels]
    rows = sum(label.count("\n") + 1 for label in lines)
    height, below = 2.6 + 0.17 * rows, 0.62 + 0.17 * rows
    with mpl.rc_context(plots.STYLE):
        fig, (axes,) = plots.figure(4.3, height)
        fig.set_layout_engine(None)  # the margins are known, and an engine draws everything twice
        fig.subplots_adjust(0.13, below / height, 0.975, 1 - 0.1 / height)
        seen: dict[str, int] = {}
        for curve, label in zip(moving, lines, strict=True):
            styles = _FORWARD_STYLES if curve.of == FORWARD else _STYLES
            style, marker = styles[seen.setdefault(curve.of, 0) % len(styles)]
            seen[curve.of] += 1
            color = _COLORS[curve.of]
            axes.plot(axis.x, curve.factors, style, marker=marker, ms=2.5, lw=1.4, color=color, label=label)
            axes.plot(axis.here, curve.factors[axis.x.index(axis.here)], "o", ms=6, color=color)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
        axes.axvline(axis.here, color=plots.INK, lw=0.8, ls=":")
        if axis.base is not None and axis.base != axis.here and min(axis.x) <= axis.base <= max(axis.x):
            axes.axvline(axis.base, color=plots.GREY, lw=0.8, ls=":")
            axes.annotate(
                "base", (axis.base, 1), xycoords=("data", "axes fraction"), xytext=(2, -9), textcoords="offset points"
            )
        axes.set_xlabel(axis.name)
        fig.legend(loc="lower left", bbox_to_anchor=(0.02, 0), fontsize=8.5, handlelength=2.4, labelspacing=0.25)
        return fig


def _of(curve: Curve) -> str:
    return "multiplier" if curve.of == FORWARD else f"{CELLS[curve.of]} of"


def _wrapped(label: str, width: int = 52) -> str:
    return "\n".join(textwrap.wrap(label.strip(), width))


def _short(value: float) -> str:
    """``1/16``, ``1``, ``512``, ``32k``, ``4M``: powers of two, and so are k and M."""
    if value < 1:
        return f"1/{round(1 / value)}"
    for unit, size in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if value >= 4 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def roles_in_words(roles: Iterable[str], of: Iterable[Curve] = ()) -> str:
    """Roles by their kinds: ``attention, experts but down, router`` is read, eleven names are not.

    Args:
        roles: names as :class:`Curve` has them. of: all curves of the axis: a kind that is there in full is named alone.
    """
    every = [_parted(name) for name in {role for curve in of for role in curve.roles}]
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in roles:
        kind, part, where = _parted(name)
        kinds.setdefault((kind, where), []).append(part)
    words = []
    for (kind, where), parts in kinds.items():
        there = sum((kind, where) == (other, place) for other, _, place in every)
        part = "" if len(parts) >= there or not parts[0] else f" {'/'.join(parts)}"
        words.append(f"{kind.replace('_', ' ')}{part}{f' {where}' if where else ''}")
    return ", ".join(words)


def _parted(name: str) -> tuple[str, str, str]:
    """Kind, part and blocks of ``expert_up [layers 0-3]``; what is no role with parts is its own kind."""
    role, _, where = name.partition(" ")
    known = ROLES.get(role)
    return (known.kind, known.part, where) if known is not None and known.part else (role, "", where)
