"""``mue tune-roles``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mue.cli.app import File, Out, Tuned, Workers, app, say_data, say_paths, with_sweep
from mue.cli.files import Set, read_tables
from mue.cli.precision import settled

if TYPE_CHECKING:
    from mue.lab.data import Data
    from mue.lab.runners.listener import RunListener


@app.command("tune-roles")
def tune_roles(
    file: File, out: Out = Path("runs/roles"), tuned: Tuned = None, workers: Workers = None, change: Set = None
) -> None:
    """Tune multipliers of lr, init std and weight decay per role on the base; optional, after the sweep.

    Probes every multiplier at once in mirrored orthogonal designs, takes joint steps only where their gain is beyond doubt,
    measures what each bought, and confirms the whole on fresh seeds against one global value. A result that is not
    confirmed is reported and not used. Interrupt it, kill it, and start it again with the same --out.

    \b
    [bold]Example[/]
      \\[base]
      width = 64
      ffn = 64
      layers = 3
      head_dim = 32
      sequence = 128
      \\[base.training]
      batch = 512
      steps = 240
      \\[tuned]              # or leave it out and give --tuned runs/sweep
      lr = 0.0089
      weight_decay = 0.1
      init_std = 0.15
      \\[data]
      source = "stdlib"
      \\[roles]              # every key has a default
      numbers = \\["lr", "init_std", "weight_decay"]
      thirds = true         # the outer thirds of the depth too
      rounds = 2
      confirm = 8           # fresh seeds

    \b
    [bold]Then[/]
      mue plan target.toml --tuned runs/roles     # or copy runs/roles/tuned.toml
    """
    from mue.lab.data.spec import describe_data, open_data
    from mue.lab.per_role.report import roles_report
    from mue.lab.per_role.tune import roles_from
    from mue.lab.per_role.tune import tune_roles as run
    from mue.lab.report.progress import RunProgress
    from mue.lab.sweep.spec import base_plan
    from mue.lab.train.run import Run

    console = Console()
    data, values = with_sweep(read_tables(file, change, ("base", "tuned", "data", "run", "roles")), tuned)

    def example(tables: dict[str, Any]) -> tuple[Run, Data]:
        spec = roles_from(tables, file.parent, values)
        corpus = open_data(spec.source)
        plan = base_plan(spec.base, spec.training, spec.tuned)
        return Run(plan, spec.settings, describe_data(spec.source, corpus)), corpus

    spec = roles_from(settled(console, data, out, example), file.parent, values)
    corpus = open_data(spec.source)
    say_data(console, corpus, tuned)

    @contextmanager
    def listener_of(title: str, runs: Sequence[Run]) -> Iterator[RunListener]:
        console.print(title, highlight=False)
        with RunProgress(console, "training", runs, label=None) as progress:  # hundreds of runs: no line for each
            yield progress

    found = run(spec, out, corpus, listener_of, workers=workers)
    page = roles_report(out)
    console.print(f"[bold]{found.verdict}[/]", highlight=False)
    say_paths(console, f"report: {page}", f"use it: mue plan FILE.toml --tuned {out}, or {out}/tuned.toml")
