"""The whole idea on real text in a few minutes: sweep a dense base, transfer, train the MoE, look at the valley."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.report import plots
from mue.lab.report.page import (
    Section,
    check_entry,
    load_sections,
    plan_section,
    runs_section,
    text,
    valley_of,
    write_report,
)
from mue.lab.report.progress import RunProgress
from mue.lab.report.tables import plan_table
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.display import Board
from mue.lab.sweep.report import sweep_section
from mue.lab.sweep.spec import SweepSpec, base_plan, sweep_from
from mue.lab.sweep.sweep import Swept, run_sweep, swept_dict
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Store
from mue.plan.plan import PlanData
from mue.plan.replan import scaled
from mue.plan.toml import shape_from, table_of, training_from
from mue.plan.transfer import transfer
from mue.shapes import Dense, Training, Transformer
from mue.util.files import write_json

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)
RULES = (("complete-mue", plots.MUE), ("standard", plots.STANDARD))


@dataclass(frozen=True)
class Experiment:
    """The demo's file, parsed."""

    spec: SweepSpec
    target: Transformer
    training: Training


def experiment(out: Path) -> Experiment:
    """``demo.toml`` of this package, with its data cache under ``out``."""
    import tomllib

    data: dict[str, Any] = tomllib.loads(files("mue.lab.demo").joinpath("demo.toml").read_text(encoding="utf-8"))
    data["data"]["cache"] = str(out / "data")
    target = table_of(data, "target")
    training = training_from(target, "target")
    assert training is not None
    return Experiment(sweep_from(data, Path()), shape_from(target, "target", ("training",)), training)


def demo(out: Path, console: Console, *, workers: int | None = None) -> Path:
    """Run the demo into ``out`` (what is done there is not done again) and return the report's path."""
    started = time.monotonic()
    ours = experiment(out)
    spec = ours.spec

    console.rule("[bold]1  real text")
    corpus = open_corpus(spec.source)
    console.print(
        f"  the standard library's source: {corpus.files} files, {corpus.bytes / 1e6:.1f} MB, bytes as tokens,"
        f" sha256 {corpus.hash[:16]}…", highlight=False,
    )  # fmt: skip

    console.rule("[bold]2  one sweep of a small dense transformer")
    swept, swept_fresh = _sweep(spec, out, corpus, console, workers)
    console.print(f"  [bold]{swept.verdict}[/]", highlight=False)

    console.rule("[bold]3  transfer to the MoE")
    plan = _transfer(ours, swept, ours.target, "complete-mue")
    console.print(plan_table(plan, width=console.width))
    plan.save(out / "plan.json")

    console.rule("[bold]4, 5  train with those values; check the valley")
    store = Store(out)
    named = _runs(ours, swept, plan, describe_data(spec.source, corpus))
    with RunProgress(console, "dense baseline, MoE, valley check", list(named.values()), _label) as progress:
        results = run_all(list(named.values()), store, workers=workers, on_event=progress.event, on_done=progress.done)
    by_name = {name: results[run.key] for name, run in named.items()}

    seconds = _total_seconds(out / "demo.json", time.monotonic() - started, fresh=progress.fresh + swept_fresh)
    summary = _summary(ours, swept, plan, named, by_name, corpus, seconds)
    write_json(out / "demo.json", summary)
    path = _report(out, plan, named, by_name, store, summary)
    _say(console, summary, path, seconds)
    return path


def _sweep(spec: SweepSpec, out: Path, corpus: Corpus, console: Console, workers: int | None) -> tuple[Swept, int]:
    """The sweep, and how many of its runs were trained now."""
    with Board(console, "sweep", spec.training.steps) as board:
        swept = run_sweep(spec, out, corpus, workers=workers, watch=board)
    return swept, board.fresh


def _total_seconds(path: Path, now: float, *, fresh: int) -> float:
    """Time spent over all sessions: a start that only reads what is done adds nothing."""
    before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
    return before + now if fresh or not before else before


def _transfer(ours: Experiment, swept: Swept, target: Transformer, rule: str) -> PlanData:
    return transfer(
        ours.spec.base, target, swept.tuned, base_training=ours.spec.training, training=ours.training, rule=rule
    )


def _runs(ours: Experiment, swept: Swept, plan: PlanData, data: dict[str, Any]) -> dict[str, Run]:
    """Every run after the sweep by name; the transferred MoE is the check's run at multiplier 1."""
    settings = ours.spec.settings
    assert plan.active_width is not None
    shape = ours.target
    dense = Dense(shape.width, plan.active_width, shape.layers, head_dim=shape.head_dim, sequence=shape.sequence)
    named = {
        "base": Run(base_plan(ours.spec.base, ours.spec.training, swept.tuned), settings, data),
        "MoE": Run(plan, settings, data),
        "dense": Run(_transfer(ours, swept, dense, "complete-mue"), settings, data),
    }
    for rule, _ in RULES:
        ruled = _transfer(ours, swept, shape, rule)
        for multiplier in MULTIPLIERS:
            named[f"{rule} × {multiplier:g}"] = Run(scaled(ruled, multiplier), settings, data)
    return named


def _label(run: Run) -> str:
    return f"{run.plan.rule.name:<12} {run.plan.target.name:<15} lr {run.plan.tuned.lr:<8.3g}"


def _points(rule: str, results: dict[str, dict[str, Any]]) -> list[tuple[float, float | None]]:
    return [(math.log2(m), results[f"{rule} × {m:g}"]["val_loss"]) for m in MULTIPLIERS]


def _summary(
    ours: Experiment,
    swept: Swept,
    plan: PlanData,
    named: dict[str, Run],
    results: dict[str, dict[str, Any]],
    corpus: Corpus,
    seconds: float,
) -> dict[str, Any]:
    """What the demo measured, with hashes: the file that README and report quote."""
    return {
        "command": "make demo",
        **provenance(),
        "seconds": round(seconds, 1),
        "data": corpus.describe(),
        "sweep": swept_dict(swept, corpus.hash),
        "plan": plan.to_dict(),
        "runs": {
            name: {k: results[name][k] for k in ("key", "plan", "name", "status", "val_loss", "tokens", "parameters", "active_parameters", "flops_per_token", "seconds", "seed")}
            for name in named
        },
        "check": {rule: check_entry(_points(rule, results)) for rule, _ in RULES},
    }  # fmt: skip


def findings(summary: dict[str, Any]) -> list[str]:
    """The results in sentences, whatever they say."""
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
    for name, said in summary["runs"].items():
        config, result = store.folder(said["key"]) / "config.json", store.result(said["key"])
        if result is None or not config.exists():
            raise ValueError(f"{store.folder(said['key'])} of run {name!r} is gone: run mue demo --out {out} again")
        parts = json.loads(config.read_text(encoding="utf-8"))
        named[name] = Run.from_dict({k: parts[k] for k in ("plan", "settings", "data")})
        results[name] = result
    return _report(out, named["MoE"].plan, named, results, store, summary)


def _report(
    out: Path,
    plan: PlanData,
    named: dict[str, Run],
    results: dict[str, dict[str, Any]],
    store: Store,
    summary: dict[str, Any],
) -> Path:
    curves = [
        {"label": label, "color": color, "metrics": store.metrics(named[name].key), "flops_per_token": results[name]["flops_per_token"]}
        for name, label, color in (
            ("base", f"tuned base, {results['base']['name']}", plots.STANDARD),
            ("dense", f"dense, {results['dense']['name']}", plots.DENSE),
            ("MoE", f"MoE, {results['MoE']['name']}", plots.MUE),
        )
    ]  # fmt: skip
    valleys = [
        {"label": rule, "points": _points(rule, results), "valley": valley_of(_points(rule, results)), "color": color}
        for rule, color in RULES
    ]
    said = findings(summary)
    facts = [
        ("command", f"{summary['command']}, {summary['seconds']:.0f} s"),
        ("machine", f"{summary['machine']}, torch {summary['torch']}, Python {summary['python']}"),
        ("code", f"mue {summary['mue']}, git {summary['git']}"),
        (
            "data",
            f"{summary['data']['files']} files, {summary['data']['bytes']:,} bytes, sha256 {summary['data']['hash']}",
        ),
    ]
    sections = [
        sweep_section(summary["sweep"]),
        plan_section(plan),
        Section(id="loss", title="Trained with those values, no retuning", texts=[text(said[0])], figure=plots.loss_figure(curves)),
        Section(
            id="check",
            title="Where does the MoE's own valley lie?",
            texts=[text("Only the learning rate is multiplied, by 1/4 to 4; 1× is the transferred value. Standard parametrization uses the base's tuned numbers as they are."), *(text(s) for s in said[1:])],
            figure=plots.check_figure(valleys),
            caption="One seed, a short run: the picture shows the kind of evidence the rule asks for, not a proof of it.",
        ),
        *load_sections(named["MoE"], store.metrics(named["MoE"].key)),
        runs_section([(name, run, results[name]) for name, run in named.items()], facts),
    ]  # fmt: skip
    gain = results["dense"]["val_loss"], results["MoE"]["val_loss"]
    cards = [
        ("learning rate tuned on the base", f"{summary['sweep']['tuned']['lr']:.2e}"),
        ("lr of the MoE's expert matrices", f"{plan.roles['expert_down'].values.lr:.2e}"),
        ("validation loss, dense of equal active width", "–" if gain[0] is None else f"{gain[0]:.3f}"),
        ("validation loss, MoE, no retuning", "–" if gain[1] is None else f"{gain[1]:.3f}"),
    ]
    lead = f"Tuned on {results['base']['name']}, trained {results['MoE']['name']} with what follows from it, on {summary['data']['bytes'] / 1e6:.0f} MB of real text."
    return write_report(out, "Tune one dense model, train the MoE", lead, sections, cards)


def _say(console: Console, summary: dict[str, Any], path: Path, seconds: float) -> None:
    console.rule("[bold]6  what came out")
    for sentence in findings(summary):
        console.print(f"  • {sentence}", highlight=False)
    console.print(
        f"\n  {seconds:.0f} s in all. The report: [bold]{path}[/] (pictures as PNG beside it)", highlight=False
    )
