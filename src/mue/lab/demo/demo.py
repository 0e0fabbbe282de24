"""The whole idea on real text in a few minutes: sweep a dense base, transfer, train the MoE three ways, look at the valleys."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mue.lab.data import Corpus, Data
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.demo.report import APPROACHES, findings, write_demo_report
from mue.lab.models.language import LanguageModel
from mue.lab.report.progress import RunProgress
from mue.lab.report.tables import plan_table
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.display import SweepDisplay
from mue.lab.sweep.result import SweepResult
from mue.lab.sweep.spec import SweepSpec, base_plan, sweep_from
from mue.lab.sweep.sweep import run_sweep
from mue.lab.train.provenance import provenance
from mue.lab.train.run import WEIGHTS_FILE, Run, Store
from mue.lab.trained.find import find, untrained
from mue.lab.trained.generate import Drawing, continued
from mue.lab.trained.tokens import tokens_of
from mue.lab.valley.multiplier_check import MultiplierCheck
from mue.plan.plan import PlanData
from mue.plan.replan import scaled
from mue.plan.toml import read_toml, shape_from, table_of, training_from
from mue.plan.transfer import transfer
from mue.shapes import Dense, Training, Transformer
from mue.util.files import write_json

FILE = Path(str(files("mue.lab.demo") / "demo.toml"))
MULTIPLIERS = (0.5, 1.0, 2.0)  # of the transferred rate: an octave to each side shows where the valley lies
SEEDS = (0, 1)  # of the runs at transferred values; the valleys are of the first
PROMPT = "def read_lines(self, path):\n"
_SAMPLE = 160  # bytes
KEPT = (  # of a run's result
    "key",
    "plan",
    "name",
    "status",
    "val_loss",
    "tokens",
    "parameters",
    "active_parameters",
    "flops_per_token",
    "seconds",
    "seed",
)


@dataclass(frozen=True)
class Experiment:
    """The demo's file, parsed."""

    spec: SweepSpec
    target: Transformer
    training: Training


def experiment(out: Path, tables: Mapping[str, Any] | None = None) -> Experiment:
    """``demo.toml`` of this package, or other tables of its kind, with the data's cache under ``out``."""
    found = read_toml(FILE) if tables is None else tables
    cache = {"cache": str(out / "data")} if "task" not in table_of(found, "run") else {}  # text has one
    data = {**found, "data": {**found["data"], **cache}}
    target = table_of(data, "target")
    training = training_from(target, "target")
    assert training is not None
    return Experiment(sweep_from(data, Path()), shape_from(target, "target", ("training",)), training)


def demo(out: Path, console: Console, *, workers: int | None = None, tables: Mapping[str, Any] | None = None) -> Path:
    """Run the demo into a folder; what is done there is not done again.

    Args:
        out: the folder. console: where people are told of it. workers: training processes (None: one for each core).
        tables: in the place of :data:`FILE`'s.

    Returns:
        The report's path.
    """
    started = time.monotonic()
    ours = experiment(out, tables)
    spec = ours.spec

    console.rule("[bold]1  real text")
    corpus = open_corpus(spec.source)
    console.print(
        f"  the standard library's source: {corpus.files} files, {corpus.bytes / 1e6:.1f} MB, bytes as tokens,"
        f" sha256 {corpus.hash[:16]}…", highlight=False,
    )  # fmt: skip

    titles = ("2  one sweep of a small dense transformer", "3  transfer to a MoE four times as wide")
    swept, plan, fresh = swept_and_planned(ours, out, corpus, console, titles, workers)

    console.rule("[bold]4  train it three ways, nothing retuned, and an octave to each side")
    store = Store(out)
    named = _runs(ours, swept, plan, describe_data(spec.source, corpus))
    with RunProgress(console, "MoE three ways, dense model", list(named.values()), label) as progress:
        by_key = run_all(
            list(named.values()), store, workers=workers, listener=progress, keep_weights={named["MoE"].key}
        )
    results = {name: by_key[run.key] for name, run in named.items()}
    checks = {
        rule: MultiplierCheck.of({m: results[f"{rule} × {m:g}"]["val_loss"] for m in MULTIPLIERS})
        for rule in APPROACHES
    }

    seconds = total_seconds(out / "demo.json", time.monotonic() - started, fresh=progress.fresh + fresh)
    summary = _summary(swept, plan, results, checks, corpus, seconds)
    summary["samples"] = _samples(named["MoE"], store)
    write_json(out / "demo.json", summary)
    path = write_demo_report(store, named, results, summary, swept.cells, checks)
    _say(console, summary, path, seconds)
    return path


def swept_and_planned(
    ours: Experiment, out: Path, data: Data, console: Console, titles: tuple[str, str], workers: int | None
) -> tuple[SweepResult, PlanData, int]:
    """The two steps that demos share: sweep the base, then plan the target from it, which is left in ``plan.json``.

    Args:
        data: what the sweep's runs read. titles: of both steps. out, console, workers: as of :func:`demo`.

    Returns:
        What the sweep found, the plan, and how many runs were trained for it now.
    """
    console.rule(f"[bold]{titles[0]}")
    with SweepDisplay(console, "sweep", ours.spec.training.steps) as display:
        swept = run_sweep(ours.spec, out, data, workers=workers, listener=display)
    console.print(f"  [bold]{swept.verdict}[/]", highlight=False)

    console.rule(f"[bold]{titles[1]}")
    plan = transferred(ours, swept, ours.target, "complete-mue")
    console.print(plan_table(plan, width=console.width))
    plan.save(out / "plan.json")
    return swept, plan, display.fresh


def total_seconds(path: Path, now: float, *, fresh: int) -> float:
    """Seconds spent over all sessions: a start that only reads what is done adds nothing.

    Args:
        path: of the last session's summary. now: seconds of this one. fresh: runs that were trained in it.
    """
    before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
    return before + now if fresh or not before else before


def transferred(ours: Experiment, swept: SweepResult, target: Transformer, rule: str) -> PlanData:
    """The plan of a shape by a rule, from the sweep's best values."""
    return transfer(
        ours.spec.base, target, swept.tuned, base_training=ours.spec.training, training=ours.training, rule=rule
    )


def equal_dense(shape: Transformer, plan: PlanData) -> Dense:
    """What an MoE has to beat: a dense model that costs as much per token."""
    assert plan.active_width is not None
    return Dense(
        shape.width,
        plan.active_width,
        shape.layers,
        head_dim=shape.head_dim,
        sequence=shape.sequence,
        image=shape.image,
    )


def _runs(ours: Experiment, swept: SweepResult, plan: PlanData, data: dict[str, Any]) -> dict[str, Run]:
    """Every run after the sweep by name; the transferred MoE is complete-mue's run at multiplier 1.

    In the order in which they tell most: an interrupted demo has its headline first.
    """
    settings = ours.spec.settings
    shape, dense = ours.target, equal_dense(ours.target, plan)
    # All validate on the same text, under the same settings; rules that agree at a multiplier share the run.
    named = {
        "base": Run(base_plan(ours.spec.base, ours.spec.training, swept.tuned), settings, data),
        "MoE": Run(plan, settings, data),
        "dense": Run(transferred(ours, swept, dense, "complete-mue"), settings, data),
    }
    ruled = {rule: transferred(ours, swept, shape, rule) for rule in APPROACHES}
    for multiplier in sorted(MULTIPLIERS, key=lambda m: m != 1):
        for rule in APPROACHES:
            named[f"{rule} × {multiplier:g}"] = Run(scaled(ruled[rule], multiplier), settings, data)
    for seed in SEEDS[1:]:
        for rule in APPROACHES:
            named[f"{rule}, seed {seed}"] = Run(ruled[rule], replace(settings, seed=seed), data)
    return named


def label(run: Run) -> str:
    """A run on one line of the progress: what differs between those of the demo."""
    return f"{run.plan.rule.name:<17} {run.plan.target.name:<15} lr {run.plan.tuned.lr:<8.3g} seed {run.settings.seed}"


def _summary(
    swept: SweepResult,
    plan: PlanData,
    results: dict[str, dict[str, Any]],
    checks: dict[str, MultiplierCheck],
    corpus: Corpus,
    seconds: float,
) -> dict[str, Any]:
    """What the demo measured, with hashes: the file that README and report quote."""
    return {
        "command": "make demo",
        **provenance(),
        "seconds": round(seconds, 1),
        "data": corpus.describe(),
        "sweep": swept.to_dict(corpus.hash),
        "plan": plan.to_dict(),
        "runs": {name: {k: result[k] for k in KEPT} for name, result in results.items()},
        "check": {rule: check.to_dict() for rule, check in checks.items()},
        "transferred": {
            rule: [results[f"{rule} × 1"]["val_loss"]] + [results[f"{rule}, seed {s}"]["val_loss"] for s in SEEDS[1:]]
            for rule in APPROACHES
        },
    }


def _samples(run: Run, store: Store) -> dict[str, str]:
    """What the MoE writes before and after its training; no second where its weights are not there any more."""
    tokens = tokens_of(run.data)
    assert tokens is not None

    def written(model: nn.Module) -> str:
        assert isinstance(model, LanguageModel)
        return "".join(continued(model, tokens, PROMPT, _SAMPLE, Drawing(), whole=True))

    folder = store.folder(run.key)
    after = find(folder).model() if (folder / WEIGHTS_FILE).exists() else None
    return {"prompt": PROMPT, "before": written(untrained(run))} | ({"after": written(after)} if after else {})


def _say(console: Console, summary: dict[str, Any], path: Path, seconds: float) -> None:
    console.rule("[bold]5  what came out")
    for sentence in findings(summary):
        console.print(f"  • {sentence}", highlight=False)
    if "after" in summary["samples"]:
        console.print(f"\n  it goes on from {PROMPT.strip()!r}:", highlight=False, markup=False)
        for line in summary["samples"]["after"].splitlines()[:5]:
            console.print(f"    │ {line}", highlight=False, markup=False)
    console.print(
        f"\n  {seconds:.0f} s in all. The report: [bold]{path}[/] (pictures as PNG beside it)", highlight=False
    )
