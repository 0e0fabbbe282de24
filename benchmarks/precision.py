"""Do runs in bf16 end where those in fp32 end, and whose doing is a difference? The demo's base and its MoE, paired by seed.

    python benchmarks/precision.py [--seeds 12] [--model MoE] [--way bf16 --way nudged ...] [--out FOLDER] [--json docs/results/precision.json]

One process of one thread. Finished runs in FOLDER are not trained again, and rows are written as they come. A pair has the same init and
batches, so what is left is rounding, and what rounding does to a training. How much that is, fp32 says itself: "nudged" is fp32 whose init
is larger by one part in a million. Beside the kernel's bf16 stand portable experts, and torch's operators alone. With ``--gradients`` nothing is
trained: the gradients of a trained fp32 MoE (of FOLDER) are compared with fp32's, way by way.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file

from mue.kernels import library
from mue.lab.data.spec import describe_data, open_data
from mue.lab.demo.demo import experiment
from mue.lab.report.progress import RunProgress
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import WEIGHTS_FILE, Run, Store
from mue.lab.train.session import TrainingSession, open_session
from mue.lab.train.step import autocast, objective
from mue.plan.transfer import transfer
from mue.shapes import HParams
from mue.util.files import write_json

ROOT = Path(__file__).parents[1]
BATCHES = 5  # of the gradients
NUDGE = 1e-6  # of every weight at init: as small as float32 allows, far below what any seed changes


@dataclass(frozen=True)
class Way:
    """How a run is computed.

    Attributes:
        precision: of the run. nudge: the init is larger by so much. portable: experts by the portable backend. torch: without the kernel.
    """

    precision: str
    nudge: float = 0.0
    portable: bool = False
    torch: bool = False


WAYS = {
    "fp32": Way("fp32"),
    "nudged": Way("fp32", nudge=NUDGE),
    "bf16": Way("bf16"),
    "bf16, portable experts": Way("bf16", portable=True),
    "bf16, torch": Way("bf16", torch=True),
}
Cell = tuple[str, str, int]
"""Model, way, seed."""


def planned(out: Path, seeds: int, models: list[str], ways: list[str]) -> tuple[dict[Cell, Run], Any]:
    """The demo's base and MoE with the values that docs/results/demo.json was tuned to, in each way and with each seed; and their data."""
    ours = experiment(out)
    corpus = open_data(ours.spec.source)
    data = describe_data(ours.spec.source, corpus)
    measured = json.loads((ROOT / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))
    tuned = HParams.from_dict(measured["sweep"]["tuned"])
    base, training = ours.spec.base, ours.spec.training
    plans = {
        "base": base_plan(base, training, tuned),
        "MoE": transfer(base, ours.target, tuned, base_training=training, training=ours.training),
    }
    runs = {
        (name, way, seed): Run(plan, replace(ours.spec.settings, precision=WAYS[way].precision, seed=seed), data)
        for seed in range(seeds)
        for name, plan in plans.items()
        if name in models
        for way in ways
        if name == "MoE" or not WAYS[way].portable  # the base has no experts
    }
    return runs, corpus


@contextmanager
def kernel_of(way: Way) -> Iterator[None]:
    """Inside of it there is no kernel where the way is torch's."""
    with ExitStack() as opened:
        if way.torch:
            opened.enter_context(mock.patch.object(library, "loaded", return_value=None))
            opened.enter_context(mock.patch.object(library, "built", return_value=False))
        yield


def set_experts(session: TrainingSession, way: Way) -> None:
    """Has its experts computed as the way asks."""
    for layer in session.moe_layers if way.portable else ():
        layer.backend = "portable"


def trained(run: Run, way: Way, store: Store, corpus: Any, progress: RunProgress) -> dict[str, Any]:
    """The result of a run that is computed in this way, found or trained now."""
    with kernel_of(way), ExitStack() as opened:
        session = open_session(run, store, corpus, opened)
        if not isinstance(session, TrainingSession):
            progress.ended(run, session, fresh=False)
            return session
        session.keep_weights = True
        if session.step == 0 and way.nudge:
            with torch.no_grad():
                for weight in session.model.parameters():
                    weight.mul_(1 + way.nudge)
        set_experts(session, way)
        while session.status is None:
            session.train_step()
            progress.moved(run, session.step, session.loss)
            session.maybe_checkpoint(10.0, stop=False)
        result = session.end()
        progress.ended(run, result, fresh=True)
        return result


def rows(results: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each model and way: losses by seed, and what they differ by from fp32's of the same seeds, with a standard error and the time."""
    found = []
    for name, way in dict.fromkeys(cell[:2] for cell in results):
        pairs = {
            s: [results.get((name, w, s), {}).get("val_loss") for w in (way, "fp32")]
            for s in {cell[2] for cell in results}
        }
        seeds = sorted(seed for seed, losses in pairs.items() if None not in losses)  # both trained, none diverged
        of = {w: [results[name, w, seed]["val_loss"] for seed in seeds] for w in (way, "fp32")}
        row: dict[str, Any] = {"model": name, "way": way, "losses": [round(loss, 4) for loss in of[way]]}
        if gone := [s for s in pairs if results.get((name, way, s), {}).get("status") == "diverged"]:
            row["diverged seeds"] = gone
        if way == "fp32":
            row["spread of seeds"] = round(statistics.stdev(of[way]), 4) if len(seeds) > 1 else None
        elif len(seeds) > 1:
            differences = [a - b for a, b in zip(of[way], of["fp32"], strict=True)]
            row["minus fp32"] = round(statistics.mean(differences), 4)
            row["standard error"] = round(statistics.stdev(differences) / len(differences) ** 0.5, 4)
            took = [results[name, way, s]["seconds"] / results[name, "fp32", s]["seconds"] for s in seeds]
            row["time / fp32"] = round(statistics.median(took), 3)
        found.append(row)
    return found


def gradients(
    run: Run, way: Way, weights: Mapping[str, torch.Tensor], corpus: Any, folder: Path
) -> list[dict[str, torch.Tensor]]:
    """Those of all parameters at these weights, by name, in float64: one dict for each of BATCHES batches."""
    found = []
    with kernel_of(way):
        session = TrainingSession(run, folder, corpus)
        session.model.load_state_dict(dict(weights))
        set_experts(session, way)
        for step in range(BATCHES):
            session.model.zero_grad()
            with autocast(session.device, session.settings):
                output = session.task.loss(session.model, session.to_device(session.batches.at(step)))
            objective(output, session.coefficients).backward()  # type: ignore[no-untyped-call]
            found.append({n: p.grad.double() for n, p in session.model.named_parameters() if p.grad is not None})
    return found


def gradient_rows(out: Path) -> list[dict[str, Any]]:
    """For each way in bf16: of each weight (all layers together) the error against fp32's gradient and by how much it is too long, in parts of it.

    Raises:
        SystemExit: the first seed's fp32 MoE has not been trained into ``out``.
    """
    runs, corpus = planned(out, 1, ["MoE"], list(WAYS))
    trained_fp32 = Store(out / "fp32").folder(runs["MoE", "fp32", 0].key) / WEIGHTS_FILE
    if not trained_fp32.exists():
        raise SystemExit(f"{trained_fp32} is not there: run this without --gradients first")
    weights = load_file(trained_fp32)
    of = {way: gradients(runs["MoE", way, 0], WAYS[way], weights, corpus, out) for way in WAYS if WAYS[way].nudge == 0}
    found = []
    for way in [way for way in of if WAYS[way].precision == "bf16"]:
        parts: dict[str, list[float]] = {}
        for own, exact in zip(of[way], of["fp32"], strict=True):
            for name, true in exact.items():
                sums = parts.setdefault(
                    ".".join(word for word in name.split(".") if not word.isdigit()), [0.0, 0.0, 0.0]
                )
                for i, value in enumerate(((own[name] - true).square(), own[name] * true, true.square())):
                    sums[i] += value.sum().item()
        errors = {name: round((error / true) ** 0.5, 4) for name, (error, _, true) in parts.items()}
        longer = {name: round(along / true - 1, 4) for name, (_, along, true) in parts.items()}
        found.append({"way": way, "error": errors, "longer": longer})
    return found


def main() -> None:
    """Train what is missing and print a row for each model and way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=12, help="at least 2")
    parser.add_argument("--model", action="append", choices=["base", "MoE"], help="both if none is said")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="beside fp32; all if none is said")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/precision"), help="folder of the runs; finished ones are kept"
    )
    parser.add_argument("--gradients", action="store_true", help="compare gradients; nothing is trained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.gradients:
        table = gradient_rows(options.out)
        for row in table:
            print(json.dumps(row))
        if options.json:
            write_json(
                options.json, {"command": "python benchmarks/precision.py --gradients", **provenance(), "rows": table}
            )
        return
    ways = [way for way in WAYS if way == "fp32" or way in (options.way or WAYS)]
    runs, corpus = planned(options.out, options.seeds, options.model or ["base", "MoE"], ways)
    asked = [f"--model {name}" for name in options.model or ()] + [f'--way "{way}"' for way in options.way or ()]
    command = " ".join(["python benchmarks/precision.py --seeds", str(options.seeds), *asked])
    results: dict[Cell, Mapping[str, Any]] = {}
    for way in ways:
        here = {cell: run for cell, run in runs.items() if cell[1] == way}
        name = {run.key: f"{cell[0]}, seed {cell[2]}" for cell, run in here.items()}
        store = Store(options.out / way)  # ways of one precision share a run's key
        with RunProgress(Console(), way, list(here.values()), lambda run, name=name: name[run.key]) as progress:
            for cell, run in here.items():
                results[cell] = trained(run, WAYS[way], store, corpus, progress)
                if options.json:
                    table = rows(results)
                    write_json(options.json, {"command": command, **provenance(), "rows": table})
    for row in rows(results):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
