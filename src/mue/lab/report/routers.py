"""The routers' part of a report: what the plan assumed against what was measured, balance, and who does what.

From a run's rows and its ``routers.json`` (``mue.lab.train.router_record``); what is not there is said to be missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mue.lab.report import router_plots as plots
from mue.lab.report.page import Section, text
from mue.lab.report.router_words import (
    RouterReading,
    Rows,
    absent_texts,
    balance_texts,
    drift_words,
    reading,
    share_words,
    span,
)
from mue.lab.train.run import Run
from mue.util.text import number

_NAMES = {
    "active": "active experts of a token",
    "share": "token share of an expert",
    "m1": "m1 = E[Σw]",
    "m2": "m2 = E[Σw²]",
    "F": "F = a·m2/m1²",
}


def router_sections(run: Run, rows: Rows, found: Mapping[str, Any] | None) -> list[Section]:
    """All that a run's page says of its routers; nothing where it has no routed experts.

    Args:
        rows: as :meth:`mue.lab.train.run.Store.metrics` gives them. found: as :meth:`mue.lab.train.run.Store.routers` does.
    """
    if not any(block.experts for block in run.plan.target.blocks):
        return []
    rows = [row for row in rows if row.get("load")]
    if not rows:
        return [Section(id="routers", title="Routers", texts=[text("No load of this run's experts was recorded.")])]
    seen = reading(run, rows)
    sections = [_summary(seen, found), _load(seen)]
    if seen.measured:
        sections.append(_over_time(seen))
    if found is not None:
        sections += _matrices(found, seen)
    return sections


def _summary(seen: RouterReading, found: Mapping[str, Any] | None) -> Section:
    """The table of plan and measurement, with what it means, and what is wrong with the balance."""
    title = "Routers: what the plan assumed, and what was measured"
    texts = balance_texts(seen)
    if not seen.measured:
        words = "Their gates were not measured (m1, m2, F, active counts, entropy): this run is from before reports had that. Only its load is known."
        return Section(id="routers", title=title, texts=[*texts, text(words)])
    first, last = seen.measured[0], seen.measured[-1]
    tokens = f" of {found['tokens']:,} tokens" if found else ""
    words = (
        f"Measured on the training batch{tokens}: at init (step {first['step']:,}) and last at step {last['step']:,}."
    )
    unknown = "" if seen.plan else " Which blocks of the plan these are is not known, so nothing is compared with it."
    texts.append(text(words + unknown))
    if found is None:
        texts.append(
            text("Co-activation, overlap and specialisation are kept when a run ends; of this one they are not there.")
        )
    texts += absent_texts(found)
    lines = []
    for name, title_of in _NAMES.items():
        began, ended = seen.values(first, name), seen.values(last, name)
        plan = seen.assumed(name)
        say = ""
        if plan:
            say = share_words(plan, ended) if name == "share" else drift_words(name, plan, began, ended, seen.layers)
        lines.append([title_of, span(plan) if plan else "–", span(began), span(ended), say])
    header = ["", "plan", "at init", "at the end", "in words"]
    return Section(id="routers", title=title, texts=texts, header=header, rows=lines, wrap=(4,))


def _load(seen: RouterReading) -> Section:
    return Section(
        id="load",
        title="Expert load over time",
        figure=plots.load_figure(seen.rows, seen.layers),
        caption=f"White: a fair share of the tokens; orange: more; purple: less.{_some(seen.layers)}",
    )


def _some(layers: Sequence[int]) -> str:
    shown = plots.drawn(len(layers))
    return f" {len(shown)} of {len(layers)} layers are drawn." if len(shown) < len(layers) else ""


def _over_time(seen: RouterReading) -> Section:
    last = seen.measured[-1]
    header = ["layer", "active ± spread", "no expert", "m1", "F", "MaxVio", "as if even", "dead", "entropy ÷ log N"]
    table = []
    for layer, own in zip(seen.layers, last["routers"], strict=True):
        N = len(own["share"])
        entropy = "–" if own["entropy"] is None else f"{own['entropy'] / math.log(max(2, N)):.3f}"
        moments = [number(own["m1"]), number(own["F"])] if own["F"] is not None else ["not finite", "not finite"]
        vio = "–" if own["max_vio"] is None else f"{own['max_vio']:.3f}"
        count = f"{own['active']:.2f} ± {own['spread']:.2f}"
        table.append(
            [str(layer), count, f"{own['idle']:.1%}", *moments, vio, f"{own['effective']:.1f} of {N}", str(own["dead"]), entropy]
        )  # fmt: skip
    return Section(
        id="routers-over-time",
        title="The two moments and the balance, tracked",
        figure=plots.over_time_figure(seen.rows, seen.layers, seen.plan),
        caption="MaxVio (2408.15664): the busiest expert's load over the mean, less 1; of a batch, so that chance alone keeps it above 0."
        " Dotted: the plan's. F = a·m2/m1², a the plan's: 1 where every token has a experts of even weights, a where one has all."
        f" Entropy: of the router's scores over their sum.{_some(seen.layers)}",
        header=header,
        rows=table,
        fold=f"the {len(table)} layers at step {last['step']:,}",
    )


def _matrices(found: Mapping[str, Any], seen: RouterReading) -> list[Section]:
    """What was looked at once, at the end."""
    own, layers = found["layers"], seen.layers
    sections = []
    if (pairs := plots.pairs_figure(own, layers)) is not None:
        sections.append(
            Section(
                id="coactivation",
                title="Which experts go together, and which are alike",
                figure=pairs,
                caption="Together: of the tokens of an expert (row), how many go to another (column) as well, over what an even and independent choice gives"
                " (co-activation, 2409.02060); orange more, purple less. Cosine: between their down projections (2406.18219), about 0 at init, 1 for"
                f" twins.{_some(layers)}",
            )
        )
    if any(layer["specialisation"] is not None for layer in own):
        sections.append(
            Section(
                id="specialisation",
                title="Who does what: classes of tokens by expert",
                figure=plots.specialisation_figure(found, layers),
                caption="An expert's share of a class of tokens over its share of all tokens (after 2409.02060); in brackets the tokens of the class in the batch."
                f" White: no preference.{_some(layers)}",
            )
        )
    counts = {tuple(a for a, n in enumerate(layer["active_counts"]) if n) for layer in own}
    title = "Active experts of a token, layer by layer"
    if all(len(count) == 1 for count in counts):
        words = ", ".join(dict.fromkeys(str(count[0]) for count in sorted(counts)))
        each = (
            f"Every token has {words} active experts in every layer."
            if len(counts) == 1
            else f"Every token of a layer has the same number: {words}."
        )
        return [*sections, Section(id="active", title=title, texts=[text(each)])]
    figure = plots.active_figure(own, layers, seen.assumed("active") or None)
    return [
        *sections,
        Section(id="active", title=title, figure=figure, caption="Shade: the share of the layer's tokens."),
    ]


def routers_table(named: Sequence[tuple[str, Run, Rows]]) -> list[Section]:
    """The routers of several runs beside each other, each by its worst layer at the end; nothing where no run has routed experts.

    Args:
        named: name, run and rows of metrics.
    """
    with_experts = [each for each in named if any(b.experts for b in each[1].plan.target.blocks)]
    if not with_experts:
        return []
    header = ["run", "active experts", "m1", "F", "MaxVio", "dead experts", "least entropy ÷ log N"]
    lines, old = [], []
    for name, run, rows in with_experts:
        measured = [row for row in rows if row.get("routers")]
        if not measured:
            old.append(name)
            continue
        last = reading(run, measured).measured[-1]["routers"]
        entropies = [x["entropy"] / math.log(max(2, len(x["share"]))) for x in last if x["entropy"] is not None]
        vios = [x["max_vio"] for x in last if x["max_vio"] is not None]
        lines.append(
            [
                name,
                *(span([x[key] for x in last]) for key in ("active", "m1", "F")),
                f"{max(vios):.3f}" if vios else "–",
                str(sum(x["dead"] for x in last)),
                f"{min(entropies):.3f}" if entropies else "–",
            ]
        )
    texts = [text("The last measurement of each; MaxVio and entropy of its worst layer.")] if lines else []
    if old:
        texts.append(text(f"Without measurements of their routers, from before they were kept: {', '.join(old)}."))
    return [Section(id="routers", title="Routers at the end", texts=texts, header=header, rows=lines)]
