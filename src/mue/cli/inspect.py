"""``mue inspect``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mue.cli.app import app


@app.command("inspect")
def inspect_(
    model: Annotated[
        str, typer.Argument(help="A transformers config.json, a folder that holds one, or a family such as qwen3_moe.")
    ] = "",
    json_: Annotated[
        bool, typer.Option("--json", help="Print as JSON; one line per family with --all-families.")
    ] = False,
    all_families: Annotated[
        bool, typer.Option("--all-families", help="Walk every family with experts in the installed transformers.")
    ] = False,
) -> None:
    """Show every parameter of a transformers model with its role, layout and fan-in, and how each was decided.

    Nothing is downloaded and no weights are built: axes are observed on the meta device and in the forward pass of a
    tiny model of the same family. Also shown: what the router's weights sum to, factors the model already has, and its
    shape in mue's numbers. The exit code is 1 where a parameter has no role (or, walking, none of a family has).
    """
    from mue.inspect import inspect, lines, walk

    if bool(model) == all_families:
        raise ValueError("give a model, or --all-families")
    if not all_families:
        found = inspect(model)
        print(json.dumps(found.to_dict(), ensure_ascii=False) if json_ else "\n".join(lines(found)))
        raise typer.Exit(1 if found.undecided else 0)
    results = []
    for result in walk():
        results.append(result)
        verdict = "passed" if result["passed"] else f"refused: {result['reason']}"
        print(json.dumps(result, ensure_ascii=False) if json_ else f"{result['family']}: {verdict}", flush=True)
    if not json_:
        print(f"{sum(r['passed'] for r in results)} of {len(results)} families passed")
