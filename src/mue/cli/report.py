"""``mue report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import app


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a demo, a sweep or a training run.")]) -> None:
    """Write the report of a finished sweep or run again, from what is on disk."""
    from mue.lab.report import run_report, sweep_report

    if (folder / "sweep.json").exists() and (folder / "demo.json").exists():
        from mue.lab.demo import report_again

        path = report_again(folder)
    elif (folder / "result.json").exists() and (folder / "sweep.json").exists():
        path = sweep_report(folder)
    elif (folder / "config.json").exists():
        path = run_report(folder)
    else:
        raise ValueError(
            f"{folder} is neither a finished sweep nor a run: expected sweep.json and result.json, or config.json"
        )
    Console().print(f"report: {path}")
