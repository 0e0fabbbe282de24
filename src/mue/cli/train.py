"""``mue train``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mue.cli.app import File, Out, Tuned, WithNames, app, say_data, with_sweep
from mue.plan.toml import read_toml


@app.command(cls=WithNames)
def train(file: File, out: Out = Path("runs/train"), tuned: Tuned = None) -> None:
    """Train the file's target (or its base, if it has no target) with the planned values.

    The file is a plan file with a [bold]\\[data][/] table (see mue sweep --help) and optionally
    [bold]\\[run][/]: task = {tasks}, seed, schedule = "wsd" | "cosine", decay, precision = "fp32" | "bf16", balance = "bias" | "loss" | "none",
    consistency (of routers that draw), eval_every, eval_sequences, log_every. Weights, metrics and a report land in OUT/runs/HASH; a run that was
    interrupted goes on exactly where its last checkpoint stands.

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
    from mue.lab.data import Corpus
    from mue.lab.data.spec import data_source, describe_data, open_corpus
    from mue.lab.report.page import run_report
    from mue.lab.report.progress import RunProgress
    from mue.lab.train.run import Run, Store
    from mue.lab.train.session import train as run_training
    from mue.lab.train.spec import PLAN_TABLES, settings_from, train_plan

    console = Console()
    data, values = with_sweep(read_toml(file), tuned)
    from mue.plan.toml import check_keys

    check_keys(data, (*PLAN_TABLES, "data", "run", "sweep"), "the file's top level")
    made = train_plan(data, values)
    source, settings = data_source(data, file.parent), settings_from(data)
    corpus: Corpus = open_corpus(source)
    say_data(console, corpus)
    run = Run(made, settings, describe_data(source, corpus))
    store = Store(out)
    console.print(f"run {run.key}, plan {made.hash}: {made.target.name}, {made.target.parameters:,} parameters")
    with RunProgress(console, "train", [run], lambda r: r.plan.target.name) as progress:
        result = run_training(
            run, store, corpus, progress=lambda step, loss: progress.moved(run, step, loss), keep_weights=True
        )
        progress.ended(run, result, fresh=run.key in progress.seen)
    made.save(store.folder(run.key) / "plan.json")
    console.print(f"report: {run_report(store.folder(run.key))}")
