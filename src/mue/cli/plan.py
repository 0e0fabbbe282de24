"""``mue plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import File, Tuned, WithNames, app, say_paths, with_sweep
from mue.cli.files import Set, read_tables, say_differing
from mue.cli.measured_gates import write_measured_gates
from mue.cli.terminal import print_json
from mue.plan.fold import fold as folded
from mue.plan.toml import PLAN_TABLES, plan_inputs
from mue.plan.transfer import plan_of


@app.command(cls=WithNames)
def plan(
    file: File,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, full precision.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Show where each row comes from.")] = False,
    tuned: Tuned = None,
    rule: Annotated[str | None, typer.Option(help="Plan by this rule instead of the file's: {rules}.")] = None,
    change: Set = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Put all multipliers into the values: for a model with stock forward code.")
    ] = False,
    route: Annotated[
        str, typer.Option("--route", help="Who carries R with --fold: weights, or model (its own route scale).")
    ] = "weights",
    save: Annotated[Path | None, typer.Option(help="Also save the plan as JSON here (mue.Plan.load reads it).")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write the plan as a page: values by what they rest on, factors as pictures."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure-gates",
            help="Measure the weights of routers at init on text of [data], and write gates and gate_moments into FILE where they"
            " do not sum to one.",
        ),
    ] = False,
) -> None:
    """Print every hyperparameter of the target, role by role.

    \b
    [bold]Example[/] (leave out both training tables for no change of batch or duration):
      \\[base]               # the dense model you tuned
      width = 128
      ffn = 128
      layers = 8
      \\[base.training]
      batch = 524288        # tokens per step
      steps = 25000
      \\[tuned]
      lr = 1e-3
      weight_decay = 0.1
      init_std = 0.01
      \\[target]             # the MoE you want: 128 experts, 8 active, 1 shared
      moe = "128e8a1s"
      width = 1024
      expert = 1024
      layers = 8
      \\[target.training]
      batch = 524288
      steps = 100000
    """
    from mue.lab.report.tables import plan_table

    if route != "weights" and not fold:
        raise ValueError(f"--route {route} says who carries R in a folded plan: give --fold too")
    if measure:
        if change or rule:
            raise ValueError("--measure-gates writes into FILE what its own values give: leave --set and --rule out")
        write_measured_gates(file, tuned)
    data, values = with_sweep(read_tables(file, change, PLAN_TABLES, {"rule": rule}), tuned)
    made = plan_of(plan_inputs(data, values))
    say_differing(made.inputs)
    if fold:
        made = folded(made, route)
    if save is not None:
        made.save(save)
    if html is not None:
        from mue.lab.report.plan_page import plan_page

        plan_page(made, html)
    if json_:
        print_json(made.to_dict())
    else:
        console = Console()
        console.print(plan_table(made, width=console.width, sources=sources))
        if html is not None:
            say_paths(console, f"page: {html}")
