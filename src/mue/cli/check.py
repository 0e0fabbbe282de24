"""``mue check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import app
from mue.cli.files import Set, read_plan
from mue.cli.terminal import print_json


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="file.py:function or module:function; or a transformers config or family.", show_default=False
        ),
    ],
    plan: Annotated[Path, typer.Argument(help="A plan: JSON that was saved, or a TOML file.", show_default=False)],
    json_: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run this check only; may be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Leave this check out; may be repeated.")] = None,
    allow_unmeasured: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-unmeasured", help="A check, or a place (* is any part), that may stay unmeasured; may be repeated."
        ),
    ] = None,
    change: Set = None,
) -> None:
    """Prove that a model is wired as planned, before money is spent. Exit code 1 where something is wrong, 3 where something
    planned could not be measured.

    The function is called with the plan and returns the model, or a dict with model and any of batch, optimizer, scheduler,
    checkpoint, clip and loss: what is given is checked. A transformers config is built on the meta device and checked by its
    shapes and gates. See docs/checks.md for what each check measures.

    \b
    [bold]Examples[/]
      mue check train.py:build plan.json
      mue check train.py:build plan.json --json > wiring.json   # in CI
      mue plan plan.toml --fold --save stock.json                # stock forward code has no multipliers
      mue check config.json stock.json                           # 671 B without weights
    """
    from mue.checks import check as run
    from mue.cli.user_model import arguments

    made = read_plan(plan, change)
    report = run(
        plan=made,
        raises=False,
        only=tuple(only or ()),
        skip=tuple(skip or ()),
        allow_unmeasured=tuple(allow_unmeasured or ()),
        **arguments(model, made),
    )
    if json_:
        print_json(report.to_dict())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1 if report.failures else 3)
