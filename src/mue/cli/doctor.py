"""``mue doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from mue.cli.app import app
from mue.cli.terminal import print_json


@app.command("doctor")
def doctor(
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Compile the native kernel first, if it is not there (seconds; needs a C++ compiler)."
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="How long to measure.")] = 5.0,
) -> None:
    """Show what this machine offers, which MoE backends are active and why others are not, and measure each.

    The ratio is forward + backward time over that of an eager dense feed-forward network of the same active width:
    1.0 means that experts cost nothing extra. Nothing is ever compiled but with --build; without the native kernel
    everything works, at the portable backend's speed.

    Example: mue doctor --build
    """
    from mue.kernels import library
    from mue.lab.doctor.report import make_report, render
    from mue.moe.backends.native import build as compile_kernel

    if build:
        path = compile_kernel()
        library.forget()  # what was looked for before it was there
        if not json_:
            print(f"native kernel: {path}\n")
    report = make_report(seconds)
    if json_:
        print_json(report, indent=None)
    else:
        print(render(report))
