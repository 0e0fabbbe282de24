"""``mue report``."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import app, say_paths

_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder that the page on several folders goes into, as report.html beside its pictures \\[default: runs/compare].",
        show_default=False,
    ),
]
_Csv = Annotated[Path | None, typer.Option("--csv", help="Also write every trial of a sweep to this file.")]
_Storage = Annotated[
    str | None, typer.Option("--storage", help="Of a sweep in this storage, on a machine that has had no part in it.")
]
_Study = Annotated[str | None, typer.Option("--study", help="Which sweep, where the storage holds several.")]


def _owner(folder: Path) -> Path:
    """The folder that a ``runs/`` full of runs is in, which is the one that has a report; any other as it is."""
    from mue.lab.train.run import CONFIG_FILE

    whole = folder.resolve()
    full = whole.name == "runs" and any(whole.glob(f"*/{CONFIG_FILE}"))
    return folder if not full else folder.parent if folder.name == "runs" else whole.parent


_List = Annotated[bool, typer.Option("--list", help="Only show a sweep's table here, and write nothing.")]


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folder of a demo, a sweep, a per-role search, or what mue train -o wrote, or the runs/ in one; of several the runs are compared.",
        ),
    ],
    out: _Out = None,
    csv: _Csv = None,
    listed: _List = False,
    storage: _Storage = None,
    study: _Study = None,
) -> None:
    """Write the report of a demo, a run or a sweep, from what is on disk; of a sweep also while it runs. Several runs, in one
    folder or in several, are compared on one page.

    \b
    [bold]Example[/]
      mue report runs/train                   # a page for each run, and one on all of them
      mue report runs/sweep --list            # how far it is, its valleys, who is training what
      mue report runs/sweep --csv trials.csv
      mue report runs/ours runs/mup           # curves, losses with intervals, what differs
      mue report runs/here --storage postgresql://me@db/sweeps     # into a new folder
    """
    from mue.lab.train.run import CONFIG_FILE

    # This process is short, and looking for garbage among 10,000 trials is a fifth of its time, half of that at exit
    # (docs/LOG.md, "Many workers on one storage").
    gc.disable()
    atexit.register(gc.freeze)
    console = Console()
    folder, *more = folders = [_owner(one) for one in folders]
    if more:
        if csv or listed or storage or study:
            raise ValueError("--csv, --list, --storage and --study are of one sweep: give one folder")
        if out is not None and out.suffix.lower() in (".html", ".htm"):
            raise ValueError(f"--out is a folder, which gets the page as report.html: give --out {out.with_suffix('')}")
        from mue.lab.report.compare import compare_folders

        say_paths(console, f"report: {compare_folders(folders, out or Path('runs/compare'))}")
        return
    if out is not None:
        raise ValueError(f"--out is where the page on several folders goes; the report of {folder} is written into it")
    if storage:  # first: then this folder holds a sweep, like any other machine's
        from mue.lab.sweep.state import join

        join(folder, storage, study)
    swept = (folder / "sweep.json").exists()
    if (csv or listed) and not swept:
        raise ValueError(f"--csv and --list are of a sweep's trials, and {folder} holds no sweep")
    if listed:
        from mue.lab.sweep.display import sweep_table
        from mue.lab.sweep.state import SweepState

        state = SweepState.load(folder)
        console.print(sweep_table(state.read_trials().all(), str(folder), state.spec.training.steps))
        return
    # A demo's folder holds a sweep as well, so it is asked for first.
    if swept and (folder / "demo.json").exists():
        from mue.lab.demo.report import report_again

        path = report_again(folder)
    elif swept:
        from mue.lab.sweep.report import sweep_report

        path = sweep_report(folder, csv=csv)
    elif (folder / "roles.json").exists():
        from mue.lab.per_role.report import roles_report

        path = roles_report(folder)
    elif (folder / CONFIG_FILE).exists():
        from mue.lab.report.runs import run_report

        path = run_report(folder, pictures=True)
    elif any(folder.glob(f"runs/*/{CONFIG_FILE}")):
        from mue.lab.report.runs import folder_report

        path = folder_report(folder)
    else:
        raise ValueError(
            f"{folder} is neither a sweep nor a run: expected sweep.json, config.json, or runs/ as mue train leaves it"
        )
    say_paths(console, f"report: {path}")
