"""``mue inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mue.cli.app import app
from mue.cli.terminal import print_json


@app.command("inspect")
def inspect_(
    model: Annotated[
        str,
        typer.Argument(
            help="A transformers config.json, a folder that holds one, a family such as qwen3_moe; or file.py:name,"
            " module:name, package.module.Class: a model's class, or a function that builds one."
        ),
    ] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="For a class: JSON with the config to build it from.")
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="file.py:NAME of a list of mue.Layout rows of your own; they win.")
    ] = "",
    measure: Annotated[
        bool, typer.Option("--measure-gates", help="Measure the gate_moments of routers that do not renormalise.")
    ] = False,
    router_std: Annotated[
        float | None,
        typer.Option(
            "--router-std",
            min=1e-12,
            help="With --measure-gates: the planned std of the router, init_std·√(base width/width); default: the model's own.",
        ),
    ] = None,
    propose: Annotated[
        bool,
        typer.Option(
            "--propose",
            help="Of a function that returns any torch model: propose its method layout(), each row decided or marked for a look.",
        ),
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print as JSON; one line per family with --all-families.")
    ] = False,
    all_families: Annotated[
        bool,
        typer.Option("--all-families", help="Walk the families with experts, and all of diffusers that draw images."),
    ] = False,
) -> None:
    """Show every parameter of a model with its role, layout and fan-in, and how each was decided.

    Nothing is downloaded and no weights are built or read: axes are observed on the meta device and in the forward pass of
    a tiny model of the same family. Also shown: what the router's weights sum to, factors the model already has, and its
    shape in mue's numbers; for a folder with weights, which tensors are missing, unexpected or of another size. The exit
    code is 1 where a parameter has no role or the weights do not fit (walking: where none of a family has).

    \b
    [bold]Examples[/]
      mue inspect qwen3_moe
      mue inspect checkpoint-1000                               # config and shards against each other
      mue inspect olmoe --measure-gates --router-std 0.005      # the gate_moments line of a plan file
      mue inspect model.py:MyModel --config my.json --rows model.py:ROWS
      mue inspect train.py:build --propose                      # a layout() to paste into a model of your own
    """
    from mue.layouts.inspect import inspect, lines, measure_gates
    from mue.util.importing import imported

    if bool(model) == all_families:
        raise ValueError("give a model, or --all-families")
    if router_std is not None and not measure:
        raise ValueError("--router-std is read only with --measure-gates")
    if propose:
        if all_families or measure or rows or config is not None:
            raise ValueError("--propose takes a function that builds a model, and no other option but --json")
        _propose(model, json_)
    if all_families:
        _walk(json_)
        return
    own: Any = imported(rows) if rows else ()
    moments = measure_gates(model, own, config, router_std=router_std) if measure else None
    found = inspect(model, own, None if moments is None else moments.pair, config)
    if json_:
        print_json({**found.to_dict(), "moments": moments and vars(moments)}, indent=None)
    else:
        print("\n".join([*lines(found), *([moments.how] if moments is not None else [])]))
    fits = found.stored is None or found.stored.fits
    raise typer.Exit(0 if fits and not found.undecided else 1)


def _propose(source: str, json_: bool) -> None:
    """Print a method ``layout()`` for the model that a function builds; the exit code is 1 where a parameter got no role."""
    from mue.layouts.propose import built, propose

    found = propose(*built(source))
    if json_:
        print_json(found.to_dict(), indent=None)
    else:
        print(found.text())
    raise typer.Exit(0 if all(row.layout is not None for row in found.rows) else 1)


def _walk(json_: bool) -> None:
    """Walk every family, a line as soon as each is known."""
    from mue.layouts.inspect import walk

    results = []
    for result in walk():
        results.append(result)
        if json_:
            print_json(result, indent=None)
        else:
            verdict = "passed" if result["passed"] else f"refused: {result['reason']}"
            print(f"{result['family']}: {verdict}", flush=True)
    if not json_:
        print(f"{sum(r['passed'] for r in results)} of {len(results)} families passed")
