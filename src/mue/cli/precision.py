"""What commands that train do about ``[run] precision = "auto"`` before they read the file's values: settle it, and say how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mue.cli.app import say_paths

if TYPE_CHECKING:
    from mue.lab.data import Data
    from mue.lab.train.run import Run

Tables = dict[str, Any]


def settled(
    console: Console,
    tables: Tables,
    folder: Path,
    example: Callable[[Tables], tuple[Run, Data]],
    *,
    decided: Callable[[Callable[[str], Tables]], str | None] | None = None,
    dry_run: bool = False,
) -> Tables:
    """The file's tables with a precision in the place of "auto", as :func:`mue.lab.runners.precision.settle_precision` finds it.

    Args:
        folder, example, decided: as it takes them. dry_run: nothing is measured, and fp32 stands for it.
    """
    from mue.lab.train.spec import AUTO

    run = tables.get("run") or {}
    if run.get("precision") != AUTO:
        return tables
    if dry_run:
        console.print("precision: fp32 or bf16, measured when it begins", highlight=False)
        return {**tables, "run": {**run, "precision": "fp32"}}
    from mue.lab.runners.precision import settle_precision

    tables, told = settle_precision(tables, folder, example, decided=decided)
    if told:
        say_paths(console, told)
    return tables
