"""``mue train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import File, Log, Out, Tuned, WithNames, app, say_data, say_paths, with_sweep
from mue.cli.files import Set, read_tables
from mue.plan.toml import PLAN_TABLES


@app.command(cls=WithNames)
def train(
    file: File,
    out: Out = Path("runs/train"),
    tuned: Tuned = None,
    rule: Annotated[str | None, typer.Option(help="Plan by this rule instead of the file's: {rules}.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the init and of the order of the batches.")] = None,
    log: Log = None,
    device: Annotated[
        str,
        typer.Option(help="As torch names it: cpu, cuda:1 [default: a GPU where there is one].", show_default=False),
    ] = "",
    change: Set = None,
) -> None:
    """Train the file's target (or its base, if it has no target) with the planned values.

    The file is a plan file with a [bold]\\[data][/] table (see mue sweep --help) and optionally
    [bold]\\[run][/]: task = {tasks}, seed, schedule = "wsd" | "cosine", decay, precision = "fp32" | "bf16", balance = "bias" | "loss" | "none",
    consistency (of routers that draw), eval_every, eval_sequences, log_every. Weights, metrics and a report land in OUT/runs/HASH; a run that was
    interrupted goes on exactly where its last checkpoint stands. On a CPU a few seconds of measuring choose how many threads
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

    from mue.lab.data.spec import data_source, describe_data, open_corpus
    from mue.lab.report.page import run_report
    from mue.lab.report.progress import RunProgress
    from mue.lab.runners.threads import set_threads
    from mue.lab.sweep.listener import Broadcast
    from mue.lab.sweep.metric_sinks import open_sinks
    from mue.lab.train.run import Run, Store
    from mue.lab.train.session import train as run_training
    from mue.lab.train.spec import settings_from, train_plan
    from mue.lab.train.step import device_named

    console = Console()
    tables = read_tables(file, change, (*PLAN_TABLES, "data", "run"), {"rule": rule, "run.seed": seed})
    data, values = with_sweep(tables, tuned)
    made = train_plan(data, values)
    source, settings = data_source(data, file.parent), settings_from(data)
    place = device_named(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sinks = open_sinks(log or [], out)
    corpus = open_corpus(source)
    say_data(console, corpus)
    run = Run(made, settings, describe_data(source, corpus))
    store = Store(out)
    folder = store.folder(run.key)
    say_paths(console, f"run {run.key}, plan {made.hash}: {made.target.name}, {made.target.parameters:,} parameters")
    if place.type == "cpu" and store.result(run.key) is None:
        say_paths(console, set_threads(run, store, corpus))
    progress = RunProgress(console, "train", [run], lambda r: r.plan.target.name)
    with Broadcast(*sinks, progress) as listener:
        result = run_training(
            run,
            store,
            corpus,
            progress=lambda step, loss: listener.moved(run, step, loss),
            keep_weights=True,
            device=place,
        )
        listener.ended(run, result, fresh=run.key in progress.seen)
    made.save(folder / "plan.json")
    say_paths(console, f"report: {run_report(folder)}")
