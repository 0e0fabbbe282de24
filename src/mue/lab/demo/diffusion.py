"""The whole idea on images in a few minutes: sweep a dense diffusion transformer, transfer, train MoE and dense, draw digits and have them judged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mue.lab.data import ImageSet
from mue.lab.data.spec import describe_data, open_data
from mue.lab.demo.demo import (
    KEPT,
    MULTIPLIERS,
    Experiment,
    equal_dense,
    experiment,
    label,
    swept_and_planned,
    total_seconds,
    transferred,
)
from mue.lab.demo.diffusion_report import findings, write_diffusion_report
from mue.lab.models.draw import draw
from mue.lab.models.sampling import Sampling
from mue.lab.report.grids import grid, write_png
from mue.lab.report.progress import RunProgress
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.result import SweepResult
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Store
from mue.lab.trained.find import find
from mue.lab.trained.images.classifier import train_classifier
from mue.lab.trained.images.sample import model_of
from mue.lab.trained.images.score import score
from mue.lab.valley.multiplier_check import MultiplierCheck
from mue.plan.plan import PlanData
from mue.plan.replan import scaled
from mue.plan.toml import read_toml
from mue.util.files import write_json

FILE = Path(str(files("mue.lab.demo") / "diffusion.toml"))
WAY = Sampling(guidance=1.5, steps=15, sampler="heun")
SEEDS = (
    0,
    1,
    2,
)  # of MoE and dense at transferred values, whose difference is smaller than that of two seeds; the rest is of the first
OF_EACH = 32  # samples of a class, for the scores
SHOWN = 8  # of them in the grid
GRID_FILE = "samples.png"


def diffusion_demo(
    out: Path, console: Console, *, workers: int | None = None, tables: Mapping[str, Any] | None = None
) -> Path:
    """Run the demo on images into a folder; what is done there is not done again.

    Args:
        out, console, workers, tables: as of :func:`mue.lab.demo.demo.demo`.

    Returns:
        The report's path.
    """
    started = time.monotonic()
    ours = experiment(out, read_toml(FILE) if tables is None else tables)
    spec = ours.spec

    console.rule("[bold]1  images")
    data = open_data(spec.source)
    assert isinstance(data, ImageSet)
    console.print(f"  {data.summary()}", highlight=False, markup=False)

    titles = ("2  one sweep of a small dense diffusion transformer", "3  transfer to a MoE of twice the width")
    swept, plan, fresh = swept_and_planned(ours, out, data, console, titles, workers)

    console.rule("[bold]4  train MoE and dense, nothing retuned, and an octave to each side")
    store = Store(out)
    named = _runs(ours, swept, plan, describe_data(spec.source, data))
    kept = {named[name].key for name in ("dense", "MoE")}
    with RunProgress(console, "MoE and dense", list(named.values()), label) as progress:
        by_key = run_all(list(named.values()), store, workers=workers, listener=progress, keep_weights=kept)
    results = {name: by_key[run.key] for name, run in named.items()}

    console.rule("[bold]5  draw digits, and have them judged")
    drawn = _drawn({n: run for n, run in named.items() if results[n]["status"] == "finished"}, store, data)
    picture = drawn.pop("grid")
    if picture is not None:
        write_png(out / GRID_FILE, picture)
    summary = {
        "command": "mue demo --diffusion",
        **provenance(),
        "seconds": total_seconds(out / "demo.json", time.monotonic() - started, fresh=progress.fresh + fresh),
        "data": data.describe(),
        "sweep": swept.to_dict(data.hash),
        "plan": plan.to_dict(),
        "runs": {name: {k: result[k] for k in KEPT} for name, result in results.items()},
        "transferred": {
            name: [results[name]["val_loss"]] + [results[f"{name}, seed {s}"]["val_loss"] for s in SEEDS[1:]]
            for name in ("MoE", "dense")
        },
        "check": MultiplierCheck.of({m: results[_name(m)]["val_loss"] for m in MULTIPLIERS}).to_dict(),
        **drawn,
    }
    write_json(out / "demo.json", summary)
    samples = None if picture is None else out / GRID_FILE
    path = write_diffusion_report(store, named, results, summary, swept.cells, samples)
    for sentence in findings(summary):
        console.print(f"  • {sentence}", highlight=False)
    console.print(
        f"\n  {summary['seconds']:.0f} s in all. {'' if samples is None else f'The digits: [bold]{samples}[/]; '}The report: [bold]{path}[/]",
        highlight=False,
    )
    return path


def _name(multiplier: float) -> str:
    return "MoE" if multiplier == 1 else f"MoE × {multiplier:g}"


def _runs(ours: Experiment, swept: SweepResult, plan: PlanData, data: dict[str, Any]) -> dict[str, Run]:
    """Every run after the sweep by name, the longest first: an interrupted demo has its headline, and no core waits at the end."""
    settings, dense = ours.spec.settings, equal_dense(ours.target, plan)
    plans = {"MoE": plan, "dense": transferred(ours, swept, dense, "complete-mue")}
    named = {name: Run(own, settings, data) for name, own in plans.items()}
    for seed in SEEDS[1:]:
        named |= {f"{name}, seed {seed}": Run(own, replace(settings, seed=seed), data) for name, own in plans.items()}
    named |= {_name(m): Run(scaled(plan, m), settings, data) for m in MULTIPLIERS if m != 1}
    return {**named, "base": Run(base_plan(ours.spec.base, ours.spec.training, swept.tuned), settings, data)}


def _drawn(named: Mapping[str, Run], store: Store, data: ImageSet) -> dict[str, Any]:
    """What MoE and dense draw, scored, with the MoE's first samples as a grid, which is None where it is not among ``named``.

    Args:
        named: runs that finished.
    """
    count = len(data.classes)
    classes, seeds = list(range(count)) * OF_EACH, [seed for seed in range(OF_EACH) for _ in range(count)]
    classifier = train_classifier(data)
    scores, picture = {}, None
    for name in [name for name in ("MoE", "dense") if name in named]:
        images = draw(model_of(find(store.folder(named[name].key))), classes, seeds, WAY)
        scores[name] = score(images, np.array(classes), data, classifier).to_dict()
        picture = grid(images[: SHOWN * count], count) if name == "MoE" else picture
    return {"grid": picture, "way": asdict(WAY), "scores": scores}
