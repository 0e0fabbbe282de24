"""``mue demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import Workers, app
from mue.cli.files import Set, read_tables
from mue.plan.toml import TABLES

_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for runs and results; rerun with the same to go on \\[default: runs/demo, or runs/diffusion].",
        show_default=False,
    ),
]
_Diffusion = Annotated[bool, typer.Option("--diffusion", help="On images instead of text (extra images).")]


@app.command()
def demo(out: _Out = None, diffusion: _Diffusion = False, workers: Workers = None, change: Set = None) -> None:
    """Run the whole idea on real text, or on images, in a few minutes, and write a report.

    Sweeps lr × weight decay × init std of a small dense transformer on the Python standard library's own source,
    transfers to a 16e4a1s MoE of twice the width, trains it with those values, and sweeps the learning-rate multiplier
    to show where the MoE's own valley lies. With --diffusion the same on scikit-learn's handwritten digits: a dense diffusion transformer is swept,
    a 16e4a1s MoE of twice its width draws digits, and a classifier that was trained apart says whether they are those asked for.
    Interrupt it at any time: the next start goes on. --set changes what it does (mue/lab/demo/demo.toml, diffusion.toml), in an --out of its own.
    """
    import os
    import webbrowser

    from mue.lab.demo.demo import FILE
    from mue.lab.demo.demo import demo as run
    from mue.lab.demo.diffusion import FILE as IMAGES_FILE
    from mue.lab.demo.diffusion import diffusion_demo

    console = Console()
    made, file, name = (diffusion_demo, IMAGES_FILE, "diffusion") if diffusion else (run, FILE, "demo")
    path = made(out or Path("runs") / name, console, workers=workers, tables=read_tables(file, change, TABLES))
    # Somebody is looking, and there is a screen to show it on.
    if console.is_terminal and (
        sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(path.absolute().as_uri())
