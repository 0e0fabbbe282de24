"""What the demo found, in sentences and as a page, from its summary and its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mue.lab.demo.figures import outcome_figure
from mue.lab.report import plots
from mue.lab.report.page import Section, runs_section, text, write_report
from mue.lab.report.plan_page import pictures_section, plan_sections
from mue.lab.report.routers import router_sections
from mue.lab.sweep.report import sweep_section
from mue.lab.sweep.result import Cell
from mue.lab.train.run import Run, Store
from mue.lab.train.task import task_of
from mue.lab.valley.multiplier_check import MultiplierCheck

# who is compared on the MoE, by rule, in the order of the pictures
APPROACHES = {
    "complete-mue": "complete-mue",
    "hidden-ratio-only": "what stacks do (one ratio of widths)",
    "standard": "the base's numbers as they are",
}
COLORS = {"complete-mue": plots.MUE, "hidden-ratio-only": plots.DENSE, "standard": plots.STANDARD}


def findings(summary: Mapping[str, Any]) -> list[str]:
    """The results in sentences, whatever they say.

    Args:
        summary: what ``demo.json`` holds.
    """
    runs, check = summary["runs"], summary["check"]
    means = {rule: mean_of_seeds(losses) for rule, losses in summary["transferred"].items()}
    seeds = len(summary["transferred"]["complete-mue"])
    out = []
    listed = ", ".join(f"{APPROACHES[rule]} {'diverged' if y is None else f'{y:.3f}'}" for rule, y in means.items())
    out.append(
        f"Losses are nats a byte, means of {seeds} seeds, nothing retuned. The MoE of four times the base's width reaches: {listed}."
    )
    ours = means["complete-mue"]
    for rule, theirs in means.items():
        if rule == "complete-mue" or ours is None or theirs is None:
            continue
        pairs = [
            b - a for a, b in zip(summary["transferred"]["complete-mue"], summary["transferred"][rule], strict=True)
        ]
        same = all(p > 0 for p in pairs) or all(p < 0 for p in pairs)
        words = "in each seed" if same else "but not in each seed: level"
        out.append(
            f"complete-mue ends {abs(theirs - ours):.3f} {'lower' if theirs > ours else 'higher'} than {APPROACHES[rule]}, {words}."
        )
    tuned = {
        rule: min((y, float(m)) for m, y in entry["losses"].items() if y is not None)
        for rule, entry in check.items()
        if any(y is not None for y in entry["losses"].values())
    }
    best = ", ".join(f"{APPROACHES[rule]} {y:.3f} at {m:g}×" for rule, (y, m) in tuned.items())
    out.append(f"The rate was also retuned on the MoE itself (three rates, one seed). The lowest are: {best}.")
    moe, dense, base = (runs[name]["val_loss"] for name in ("MoE", "dense", "base"))
    if moe is not None and dense is not None:
        out.append(
            f"At equal active FLOPs a token the MoE reaches {moe:.3f}, the dense model with transferred values {dense:.3f}; the tuned base reached {base:.3f}."
        )
    tokens = {name: runs[name]["tokens"] / runs[name]["active_parameters"] for name in ("base", "MoE")}
    out.append(
        f"This is {tokens['base']:.0f} tokens for each active parameter of the base and {tokens['MoE']:.1f} of the MoE: short."
        " docs/evidence.md has longer runs, more targets and where the rule gives nothing."
    )
    return out


def mean_of_seeds(losses: Sequence[float | None]) -> float | None:
    """Of all seeds; None where one diverged."""
    finite = [y for y in losses if y is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(losses) else None


def report_again(out: Path) -> Path:
    """The report of a finished demo, from what is on disk; nothing is trained.

    Raises:
        ValueError: a run's folder is gone or damaged.
    """
    summary = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    store = Store(out)
    named, results = {}, {}
    for name, run in summary["runs"].items():
        own, result = store.run(run["key"]), store.result(run["key"])
        if result is None or own is None:
            raise ValueError(f"{store.folder(run['key'])} of run {name!r} is gone: run mue demo --out {out} again")
        named[name], results[name] = own, result
    cells = [Cell.from_dict(cell) for cell in summary["sweep"]["cells"]]
    checks = {rule: MultiplierCheck.from_dict(check) for rule, check in summary["check"].items()}
    return write_demo_report(store, named, results, summary, cells, checks)


def write_demo_report(
    store: Store,
    named: Mapping[str, Run],
    results: Mapping[str, dict[str, Any]],
    summary: Mapping[str, Any],
    cells: Sequence[Cell],
    checks: Mapping[str, MultiplierCheck],
) -> Path:
    """Write ``report.html`` and its pictures into the store's folder.

    Args:
        named, results: every run after the sweep, and its result, by name. summary: what ``demo.json`` holds.
        cells: of the sweep. checks: of each rule.
    """
    plan, unit = named["MoE"].plan, task_of(named["MoE"].settings).unit
    valleys = [
        {
            "label": APPROACHES[rule],
            "points": [(math.log2(m), loss) for m, loss in check.losses.items()],
            "valley": check.valley,
            "color": COLORS[rule],
        }
        for rule, check in checks.items()
    ]
    sentences = findings(summary)
    gained = [
        {"label": APPROACHES[rule], "losses": losses, "color": COLORS[rule]}
        for rule, losses in summary["transferred"].items()
    ]
    sections = [
        Section(
            id="gained",
            title="What a user gets: nothing retuned",
            texts=[text(s) for s in sentences],
            figure=outcome_figure(gained, valleys, results["dense"]["val_loss"], unit),
            caption="Left: the MoE at the values that each approach gives it, a dot a seed; dashes: a dense model of equal active FLOPs at complete-mue's values."
            " Right: the same with its rate halved and doubled (one seed); 1× is the transferred value.",
        ),
        loss_section(store, named, results, unit),
        _samples_section(summary),
        sweep_section(summary["sweep"], cells),
        *plan_sections(plan),
        pictures_section(plan),
        *router_sections(named["MoE"], store.metrics(named["MoE"].key), store.routers(named["MoE"].key)),
        runs_section([(name, run, results[name]) for name, run in named.items()], _facts(summary)),
    ]  # fmt: skip
    cards = [("learning rate tuned on the base", f"{summary['sweep']['tuned']['lr']:.2e}")]
    for rule, losses in summary["transferred"].items():
        mean = mean_of_seeds(losses)
        cards.append((f"loss, {APPROACHES[rule]}", "diverged" if mean is None else f"{mean:.3f}"))
    lead = f"Tuned on {results['base']['name']}, trained {results['MoE']['name']} with what follows from it, on {summary['data']['bytes'] / 1e6:.0f} MB of real text."
    return write_report(store.root, "Tune one dense model, train the MoE", lead, sections, cards)


def loss_section(store: Store, named: Mapping[str, Run], results: Mapping[str, dict[str, Any]], unit: str) -> Section:
    """Curves of the base, the dense model and the MoE, of either demo.

    Args:
        store, named, results: as of :func:`write_demo_report`. unit: of the losses.
    """
    curves = [
        {"label": label, "color": color, "metrics": store.metrics(named[name].key), "flops_per_token": results[name]["flops_per_token"]}
        for name, label, color in (
            ("base", f"tuned base, {results['base']['name']}", plots.STANDARD),
            ("dense", f"dense, {results['dense']['name']}", plots.DENSE),
            ("MoE", f"MoE, {results['MoE']['name']}", plots.MUE),
        )
    ]  # fmt: skip
    words = (
        "The base that was tuned, the MoE, and a dense model that costs as much a token, both with transferred values."
    )
    return Section(
        id="loss",
        title="Loss over tokens and over compute",
        texts=[text(words)],
        figure=plots.loss_figure(curves, unit),
    )


def _samples_section(summary: Mapping[str, Any]) -> Section:
    """What the MoE writes, before and after."""
    samples = summary["samples"]
    rows = [[when, samples[when]] for when in ("before", "after") if when in samples]
    return Section(
        id="samples",
        title="What it writes",
        texts=[
            text(
                f"Bytes drawn one by one after {samples['prompt'].strip()!r}, before the first step and after the last."
            )
        ],
        header=("training", "text"),
        rows=[
            [when, "".join(c if c.isprintable() or c == " " else "⏎" if c == "\n" else "·" for c in words)]
            for when, words in rows
        ],
        wrap=(1,),
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from: command, machine, code and data."""
    return [
        ("command", f"{summary['command']}, {summary['seconds']:.0f} s"),
        ("machine", f"{summary['machine']}, torch {summary['torch']}, Python {summary['python']}"),
        ("code", f"mue {summary['mue']}, git {summary['git']}"),
        (
            "data",
            f"{summary['data']['files']} files, {summary['data']['bytes']:,} bytes, sha256 {summary['data']['hash']}",
        ),
    ]
