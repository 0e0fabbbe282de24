"""``mue noise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import app, say_paths
from mue.cli.terminal import print_json


@app.command()
def noise(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="As of mue generate.", show_default=False)],
    batches: Annotated[
        int, typer.Option("--batches", min=2, help="How many of the run's own batches to take gradients of.")
    ] = 8,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure the gradient noise scale of a trained run: about the batch beyond which larger ones save few steps (1812.06162).

    Gradients of single sequences at the run's weights, on batches that follow its training, cost about as much as so many steps of it.
    The noise scale grows while a model trains, so that of a run's last weights is its largest. Put into a plan file beside the run it
    was measured on, plans of larger runs are warned of batches beyond it.

    \b
    [bold]Examples[/]
      mue noise runs/base
      mue noise runs/base --batches 32            # a narrower interval
      \\[base]
      training = {batch = 8192, steps = 2000, critical_batch = 21000}
    """
    import math

    import torch

    from mue.lab.data.spec import open_corpus
    from mue.lab.trained.find import find
    from mue.lab.trained.noise_scale import of_run

    found = find(run)
    corpus = open_corpus(found.run.data["source"])
    if corpus.hash != found.run.data["hash"]:
        raise ValueError(
            f"the data of {run} have changed since its training: a noise scale is of the text that it learns from"
        )
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = of_run(found, corpus, batches, place)
    training = found.run.plan.training
    assert training is not None
    ratio = training.batch / measured.value
    if json_:
        # JSON has no infinity
        interval = [measured.value, measured.low, measured.high if math.isfinite(measured.high) else None]
        print_json(
            {"run": found.run.key, "noise_scale": interval, "batch": training.batch, "tokens_read": measured.tokens}
        )
        return
    console = Console()
    say_paths(console, f"{found.name}, on {measured.tokens:,} tokens that follow its training")
    console.print(
        f"noise scale {_count(measured.value)} tokens ({_count(measured.low)} to {_count(measured.high)}); the run's batch of {training.batch:,} is"
        f" {ratio:.3g} times it\nfor a plan: training = {{batch = {training.batch}, steps = {training.steps}, critical_batch = {measured.value:.0f}}}",
        highlight=False,
        soft_wrap=True,
    )


def _count(tokens: float) -> str:
    """A number of tokens for people; of one that no run reads its size alone."""
    if tokens == float("inf"):
        return "no upper end"
    return f"{tokens:,.0f}" if tokens < 1e15 else f"{tokens:.3g}"
