"""What the demo found, in sentences and as a page, from its summary and its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mue.lab.report import plots
from mue.lab.report.page import Section, load_sections, plan_section, runs_section, text, write_report
from mue.lab.sweep.report import sweep_section
from mue.lab.sweep.result import Cell
from mue.lab.train.run import Run, Store
from mue.lab.train.task import task_of
from mue.lab.valley.multiplier_check import MultiplierCheck

# One colour for what a rule of ours made, grey for the plain one, on every picture.
COLORS = {"complete-mue": plots.MUE, "standard": plots.STANDARD}


def findings(summary: Mapping[str, Any]) -> list[str]:
    """The results in sentences, whatever they say.

    Args:
        summary: what ``demo.json`` holds.
    """
    runs, check = summary["runs"], summary["check"]
    out = []
    moe, dense, base = (runs[name]["val_loss"] for name in ("MoE", "dense", "base"))
    if moe is not None and dense is not None:
        word = "below" if moe < dense else "above"
        out.append(
            f"With transferred values and no retuning the MoE reaches {moe:.4f}, {abs(dense - moe):.4f} {word} the dense model of"
            f" equal active width ({dense:.4f}); the tuned base reached {base:.4f} on {runs['base']['tokens']:,} tokens."
        )
    for rule, entry in check.items():
        at = entry["loss_at_1"]
        if at is None:
            out.append(f"{rule}: the transferred values diverged.")
            continue
        valley = entry["valley"]
        where = "could not be fitted"
        if valley and valley["minimum_log2_lr"] is not None:
            low, high = valley["interval_log2_lr"]
            span = f"95 % interval {'open' if low is None else f'{2**low:.2g}'} to {'open' if high is None else f'{2**high:.2g}'}"
            edge = ", at the edge of what was tried" if valley["edge"] else ""
            where = f"lies at {2 ** valley['minimum_log2_lr']:.2g}× the transferred lr ({span}{edge})"
        out.append(
            f"{rule}: the valley's minimum {where}; the transferred lr gives {at:.4f},"
            f" {entry['regret_vs_best_run']:.4f} above the best of the five ({entry['best_multiplier']:g}×)."
        )
    lowest = {
        rule: min((y for y in entry["losses"].values() if y is not None), default=None) for rule, entry in check.items()
    }
    ours, plain = lowest["complete-mue"], lowest["standard"]
    if ours is not None and plain is not None:
        at_one = check["complete-mue"]["loss_at_1"], check["standard"]["loss_at_1"]
        if None not in at_one and at_one[1] < ours:
            out.append(
                f"Standard parametrization with the base's numbers as they are ({at_one[1]:.4f}) is {ours - at_one[1]:.4f} below"
                f" complete-mue at its best multiplier ({ours:.4f}) in this short run."
            )
        out.append(
            f"Lowest loss with the lr multiplier retuned on the MoE itself: complete-mue {ours:.4f}, standard {plain:.4f}."
            + (
                " Standard parametrization ends lower here: what transfers is the place of the valley, not its depth."
                if plain < ours
                else ""
            )
        )
    return out


def report_again(out: Path) -> Path:
    """The report of a finished demo, from what is on disk; nothing is trained.

    Raises:
        ValueError: a run's folder is gone or damaged.
    """
    summary = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    store = Store(out)
    named, results = {}, {}
    for name, run in summary["runs"].items():
        config, result = store.folder(run["key"]) / "config.json", store.result(run["key"])
        if result is None or not config.exists():
            raise ValueError(f"{store.folder(run['key'])} of run {name!r} is gone: run mue demo --out {out} again")
        parts = json.loads(config.read_text(encoding="utf-8"))
        named[name] = Run.from_dict({k: parts[k] for k in ("plan", "settings", "data")})
        results[name] = result
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
    curves = [
        {"label": label, "color": color, "metrics": store.metrics(named[name].key), "flops_per_token": results[name]["flops_per_token"]}
        for name, label, color in (
            ("base", f"tuned base, {results['base']['name']}", plots.STANDARD),
            ("dense", f"dense, {results['dense']['name']}", plots.DENSE),
            ("MoE", f"MoE, {results['MoE']['name']}", plots.MUE),
        )
    ]  # fmt: skip
    valleys = [
        {
            "label": rule,
            "points": [(math.log2(m), loss) for m, loss in check.losses.items()],
            "valley": check.valley,
            "color": COLORS[rule],
        }
        for rule, check in checks.items()
    ]
    sentences = findings(summary)
    sections = [
        sweep_section(summary["sweep"], cells),
        plan_section(plan),
        Section(id="loss", title="Trained with those values, no retuning", texts=[text(sentences[0])], figure=plots.loss_figure(curves, unit)),
        Section(
            id="check",
            title="Where does the MoE's own valley lie?",
            texts=[text("Only the learning rate is multiplied, by 1/4 to 4; 1× is the transferred value. Standard parametrization uses the base's tuned numbers as they are."), *(text(s) for s in sentences[1:])],
            figure=plots.check_figure(valleys, unit),
            caption="One seed, a short run: the picture shows the kind of evidence the rule asks for, not a proof of it.",
        ),
        *load_sections(named["MoE"], store.metrics(named["MoE"].key)),
        runs_section([(name, run, results[name]) for name, run in named.items()], _facts(summary)),
    ]  # fmt: skip
    gain = results["dense"]["val_loss"], results["MoE"]["val_loss"]
    cards = [
        ("learning rate tuned on the base", f"{summary['sweep']['tuned']['lr']:.2e}"),
        ("lr of the MoE's expert matrices", f"{plan.roles['expert_down'].values.lr:.2e}"),
        ("validation loss, dense of equal active width", "–" if gain[0] is None else f"{gain[0]:.3f}"),
        ("validation loss, MoE, no retuning", "–" if gain[1] is None else f"{gain[1]:.3f}"),
    ]
    lead = f"Tuned on {results['base']['name']}, trained {results['MoE']['name']} with what follows from it, on {summary['data']['bytes'] / 1e6:.0f} MB of real text."
    return write_report(store.root, "Tune one dense model, train the MoE", lead, sections, cards)


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
