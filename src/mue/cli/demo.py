"""``mue demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from mue.cli.app import Out, Workers, app
from mue.cli.files import Set, read_tables
from mue.plan.toml import TABLES


@app.command()
def demo(out: Out = Path("runs/demo"), workers: Workers = None, change: Set = None) -> None:
    """Run the whole idea on real text in a few minutes, and write a report.

    Sweeps lr × weight decay × init std of a small dense transformer on the Python standard library's own source,
    transfers to a 16e4a1s MoE of twice the width, trains it with those values, and sweeps the learning-rate multiplier
    to show where the MoE's own valley lies. Interrupt it at any time: the next start goes on. --set changes what it does
    (mue/lab/demo/demo.toml), in an --out of its own.
    """
    import os
    import webbrowser

    from mue.lab.demo.demo import FILE
    from mue.lab.demo.demo import demo as run

    console = Console()
    path = run(out, console, workers=workers, tables=read_tables(FILE, change, TABLES))
    # Somebody is looking, and there is a screen to show it on.
    if console.is_terminal and (
        sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(path.absolute().as_uri())
