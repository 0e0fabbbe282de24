"""``mue plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import File, Tuned, WithNames, app, with_sweep
from mue.plan.toml import plan_inputs, read_toml
from mue.plan.transfer import plan_of


@app.command(cls=WithNames)
def plan(
    file: File,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, full precision.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Show where each row comes from.")] = False,
    tuned: Tuned = None,
    rule: Annotated[str | None, typer.Option(help="Plan by this rule instead of the file's: {rules}.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also save the plan as JSON here (mue.Plan.load reads it).")] = None,
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

    # The lab's tables may stand beside the plan's (mue.lab.train.spec).
    data = {k: v for k, v in read_toml(file).items() if k not in ("data", "run", "sweep")}
    if rule is not None:
        data["rule"] = rule
    data, values = with_sweep(data, tuned)
    made = plan_of(plan_inputs(data, values))
    if save is not None:
        made.save(save)
    if json_:
        print(json.dumps(made.to_dict(), indent=1, ensure_ascii=False))
    else:
        console = Console()
        console.print(plan_table(made, width=console.width, sources=sources))
