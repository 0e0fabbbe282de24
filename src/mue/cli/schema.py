"""``mue schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from mue.cli.app import app
from mue.cli.terminal import print_json


@app.command("schema")
def schema_(
    kind: Annotated[str, typer.Argument(help="Of which file: plan, sweep, train or study.", show_default=False)],
) -> None:
    """Print the JSON schema of a TOML file, with which editors complete and check its keys.

    It has the rules, routers and samplers of this environment, plugins too.

    \b
    [bold]Examples[/]
      mue schema plan > plan.schema.json
      echo '#:schema ./plan.schema.json' | cat - plan.toml     # the first line by which Taplo and its editors find it
    """
    from mue.lab.schema import schema

    print_json(schema(kind))
