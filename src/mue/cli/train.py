"""``mue train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mue.cli.app import Log, Out, Tuned, WithNames, app, say_data, say_paths, with_sweep
from mue.cli.files import Set, read_tables, say_differing
from mue.cli.precision import settled
from mue.plan.toml import PLAN_TABLES

if TYPE_CHECKING:  # a run's modules need torch, and a command imports what it calls when it runs
    import torch

    from mue.lab.data import Data
    from mue.lab.runners.listener import RunListener
    from mue.lab.train.run import Run, Store


_File = Annotated[
    Path,
    typer.Argument(
        help="A TOML file; see the example below. Or a run's folder, to train it again.", show_default=False
    ),
]
_Rule = Annotated[str | None, typer.Option("--rule", help="Plan by this rule instead of the file's: {rules}.")]
_Seed = Annotated[int | None, typer.Option("--seed", help="Of the init and of the order of the batches.")]
_Device = Annotated[
    str,
    typer.Option(
        "--device", help="As torch names it: cpu, cuda:1 \\[default: a GPU where there is one].", show_default=False
    ),
]
_KeepWeights = Annotated[
    bool, typer.Option("--keep-weights/--no-keep-weights", help="Leave model.safetensors in the run's folder.")
]


@app.command(cls=WithNames)
def train(
    file: _File,
    out: Out = Path("runs/train"),
    tuned: Tuned = None,
    rule: _Rule = None,
    seed: _Seed = None,
    log: Log = None,
    device: _Device = "",
    keep_weights: _KeepWeights = True,
    change: Set = None,
) -> None:
    """Train the file's target (or its base, if it has no target) with the planned values.

    The file is a plan file with a [bold]\\[data][/] table (see mue sweep --help) and optionally
    [bold]\\[run][/]: task = {tasks}, seed, schedule = "wsd" | "cosine" | "linear" | "wsqd", decay, shift (of wsqd),
    precision = "fp32" | "bf16" | "auto" (the faster, measured once for OUT), balance = "bias" | "loss" | "none", consistency (of routers that draw), eval_every, eval_sequences, log_every. Weights, metrics and a report land in OUT/runs/HASH; a run that was
    interrupted goes on exactly where its last checkpoint stands. Given a run's folder (of a sweep, a study, a demo) instead of a file, it trains
    that very run in OUT: so a run that kept no weights gets them. On a CPU a few seconds of measuring choose how many threads
    it gets; OMP_NUM_THREADS says so by itself.

    \b
    [bold]Example[/]
      \\[base]               # without a target the base itself is trained
      width = 64
      ffn = 64
      layers = 3
      head_dim = 32
      sequence = 128
      \\[base.training]
      batch = 1024
      steps = 300
      \\[tuned]
      lr = 0.008
      weight_decay = 0.1
      init_std = 0.15
      \\[data]
      source = "stdlib"
    """
    import torch

    from mue.lab.data.spec import open_data
    from mue.lab.report.runs import run_report
    from mue.lab.runners.threads import set_threads
    from mue.lab.sweep.metric_sinks import open_sinks
    from mue.lab.train.run import WEIGHTS_FILE, Store
    from mue.lab.train.step import device_named

    console = Console()
    make: Callable[[Data], Run]
    if file.is_dir():
        options = {"--set": change, "--rule": rule, "--seed": seed, "--tuned": tuned}
        source, make = _again(file, [name for name, value in options.items() if value is not None])
    else:
        tables = read_tables(file, change, (*PLAN_TABLES, "data", "run"), {"rule": rule, "run.seed": seed})

        def example(tables: dict[str, Any]) -> tuple[Run, Data]:
            source, make = _of_file(tables, tuned, file.parent)
            return make(corpus := open_data(source)), corpus

        source, make = _of_file(settled(console, tables, out, example), tuned, file.parent)
    place = device_named(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sinks = open_sinks(log or [], out)
    corpus = open_data(source)
    say_data(console, corpus, tuned)
    run, store = make(corpus), Store(out)
    say_differing(run.plan.inputs)
    made, folder, ended = run.plan, store.folder(run.key), store.result(run.key) is not None
    if keep_weights and ended and not (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{folder} is finished and kept no weights, and what is finished is not trained again: give another --out, or --no-keep-weights"
        )
    say_paths(console, f"run {run.key}, plan {made.hash}: {made.target.name}, {made.target.parameters:,} parameters")
    if place.type == "cpu" and not ended:
        say_paths(console, set_threads(run, store, corpus))
    _train(console, run, store, corpus, sinks, keep_weights=keep_weights, device=place)
    made.save(folder / "plan.json")
    say_paths(console, f"report: {run_report(folder)}")


def _train(
    console: Console,
    run: Run,
    store: Store,
    corpus: Data,
    sinks: Sequence[RunListener],
    *,
    keep_weights: bool,
    device: torch.device,
) -> None:
    """Train the run where it is not finished, and show how far it is."""
    from mue.lab.report.progress import RunProgress
    from mue.lab.sweep.listener import Broadcast
    from mue.lab.train.session import train

    progress = RunProgress(console, "train", [run], lambda r: r.plan.target.name)
    with Broadcast(*sinks, progress) as listener:
        result = train(
            run,
            store,
            corpus,
            progress=lambda step, loss: listener.moved(run, step, loss),
            keep_weights=keep_weights,
            device=device,
        )
        listener.ended(run, result, fresh=run.key in progress.seen)


def _of_file(tables: dict[str, Any], tuned: Path | None, folder: Path) -> tuple[dict[str, Any], Callable[[Data], Run]]:
    """Where the data of a training file is, and its run on them."""
    from mue.lab.data.spec import data_source, describe_data
    from mue.lab.train.run import Run
    from mue.lab.train.spec import settings_from, train_plan
    from mue.lab.train.task import task_of

    data, values = with_sweep(tables, tuned)
    made = train_plan(data, values)
    settings = settings_from(data)
    source = data_source(data, folder, task_of(settings).reads)
    return source, lambda corpus: Run(made, settings, describe_data(source, corpus))


def _again(folder: Path, options: list[str]) -> tuple[dict[str, Any], Callable[[Data], Run]]:
    """Where the data of a run is, and the very same run on them.

    Raises:
        ValueError: the folder is none of a run, or its run is planned otherwise now; options that would make it another run; data that have
            changed.
    """
    from mue.lab.train.run import read_run

    run = read_run(folder, same=True)
    if options:
        raise ValueError(f"{options[0]} would make it another run than that in {folder}: leave it out, or give a file")

    def make(corpus: Data) -> Run:
        if corpus.hash != run.data["hash"]:
            raise ValueError(
                f"the data of {folder} have changed (sha256 {run.data['hash'][:16]} then, {corpus.hash[:16]} now): it cannot be"
                " trained again"
            )
        return run

    return run.data["source"], make
