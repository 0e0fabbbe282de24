"""``mue rules``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import Tuned, app, with_sweep
from mue.cli.files import Set, read_tables, say_differing
from mue.cli.terminal import print_file, print_json
from mue.plan.toml import PLAN_TABLES, plan_inputs


@app.command()
def rules(
    file: Annotated[Path | None, typer.Argument(help="A plan file, as mue plan reads it.", show_default=False)] = None,
    why: Annotated[
        str | None,
        typer.Option(
            "--why",
            help="Show how each number of this role (or output_multiplier, run, a fitted law, ...) comes about.",
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="With --why: of this layer only.", min=0)] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/rules.md: all tables, no file needed.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print factors and reasons as JSON.")] = False,
    tuned: Tuned = None,
    change: Set = None,
) -> None:
    """Compare every published rule on one target, with sources.

    One line per role and number, one column per rule that has an answer; below them what fitted laws of other teams would set, one line
    each, with their refusals outside the models they were fitted to; then the rules that refuse, and why.

    \b
    [bold]Examples[/]
      mue rules moe.toml                      # all rules side by side
      mue rules moe.toml --why expert_down    # one role of the file's rule, step by step
      mue rules moe.toml --why output_multiplier   # or route_scale, residual_multiplier, head_multiplier, attention_scale
      mue rules moe.toml --why run            # what a change of batch and duration moves, and what that keeps
      mue rules moe.toml --why step-law       # a fitted law: constants, range, source
      mue rules --markdown > docs/rules.md
    """
    from mue.plan.compare import compare, comparison_text
    from mue.plan.rules_page import markdown as page

    if layer is not None and why is None:
        raise ValueError("--layer goes with --why ROLE")
    if markdown:
        print_file(page())
        return
    if file is None:
        raise ValueError("mue rules needs a plan file (or --markdown): mue rules moe.toml")
    data, values = with_sweep(read_tables(file, change, PLAN_TABLES), tuned)
    inputs = plan_inputs(data, values)
    say_differing(inputs)
    if why is not None:
        from dataclasses import asdict

        from mue.plan.explain import why as derive
        from mue.plan.steps import why_lines
        from mue.plan.transfer import plan_of

        steps = derive(plan_of(inputs), why, layer)
        if json_:
            print_json([asdict(s) for s in steps])
        else:
            print(why_lines(why, steps))
        return
    made = compare(inputs)
    if json_:
        print_json(made.to_dict())
    else:
        print(comparison_text(made))
