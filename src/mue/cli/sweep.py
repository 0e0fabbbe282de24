"""``mue sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mue.cli.app import KeepWeights, Log, Workers, app, say_data, say_kept, say_paths
from mue.cli.files import Set, read_tables
from mue.cli.precision import settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from mue.lab.data import Data
    from mue.lab.sweep.result import SweepResult
    from mue.lab.sweep.spec import SweepSpec
    from mue.lab.train.run import Run

_File = Annotated[Path | None, typer.Argument(help="A TOML file; see the example below.", show_default=False)]
_Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="This machine's folder of the sweep \\[default: runs/sweep].", show_default=False),
]
_Resume = Annotated[
    Path | None, typer.Option("--resume", help="Go on with the sweep in this folder; it holds its file.")
]
_Storage = Annotated[
    str | None,
    typer.Option(
        "--storage", help="Where the trials are: sqlite:///FILE, or postgresql://USER@HOST/NAME for a cluster."
    ),
]
_Study = Annotated[
    str | None,
    typer.Option("--study", help="This sweep's name in the storage, where several of one base share it."),
]
_Lease = Annotated[
    float | None,
    typer.Option(
        "--lease", min=1, help="Seconds without a sign of life until a worker's runs go to others \\[default: 60]."
    ),
]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and what it costs; train nothing.")]
_Csv = Annotated[Path | None, typer.Option("--csv", help="Also write every trial to this file.")]


@app.command()
def sweep(
    file: _File = None,
    out: _Out = None,
    resume: _Resume = None,
    storage: _Storage = None,
    study: _Study = None,
    workers: Workers = None,
    lease: _Lease = None,
    csv: _Csv = None,
    log: Log = None,
    keep_weights: KeepWeights = False,
    dry_run: _Dry = False,
    change: Set = None,
) -> None:
    """Sweep lr × weight decay × init std (× betas) of the base, fit the valley, and write a report.

    Finished runs are never run again: interrupt it, kill it, widen the grid, and start it again with the same --out.
    Start it again while it runs, here or on other machines with the same --storage, and the workers share the work.

    \b
    [bold]Example[/]
      \\[base]
      width = 64
      ffn = 64
      layers = 3
      head_dim = 32
      sequence = 128
      \\[base.training]
      batch = 1024          # tokens per step
      steps = 150
      \\[data]
      source = "texts/"     # text, JSONL, Parquet, .bin, a folder, or "stdlib"
      \\[sweep]
      lr = \\[0.001, 0.002, 0.004, 0.008]
      weight_decay = \\[0.1]
      init_std = \\[0.05, 0.1]
      # betas = \\[\\[0.9, 0.95], \\[0.8, 0.9]]  # a fourth axis, for a base of few steps
      # adamw_lr = \\[0.002, 0.004, 0.008]  # with \\[tuned] optimizer = "muon": lr is its matrices', this the rest's
      # sampler = "valley"  # look for the minimum between the ends of lr instead ...
      # precision = 0.25    # ... until its 95 % interval is within this many octaves on each side
      # stop_early = true   # give up runs that can no longer move the minimum

    \b
    [bold]Many machines[/]
      mue sweep sweep.toml -o runs/s --storage postgresql://me@db/sweeps     # on each of them, at any time
    """
    from mue.lab.data.spec import open_data
    from mue.lab.sweep.display import SweepDisplay
    from mue.lab.sweep.listener import Broadcast
    from mue.lab.sweep.metric_sinks import open_sinks
    from mue.lab.sweep.report import sweep_report
    from mue.lab.sweep.sweep import run_sweep

    console = Console()
    spec, folder = _asked(console, file, out, resume, change, storage, study, dry_run=dry_run)
    sinks = open_sinks(log or [], folder)  # before the data: a package that is missing is said at once
    corpus = open_data(spec.source)
    say_data(console, corpus)
    if dry_run:
        _say_asked(console, spec)
        say_kept(console, spec.source)
        return
    display = SweepDisplay(console, "sweep", spec.training.steps, spec.training.batch)
    with Broadcast(*sinks, display) as listener:
        result = run_sweep(
            spec,
            folder,
            corpus,
            storage=storage,
            study=study,
            lease=lease,
            workers=workers,
            listener=listener,
            resume=resume is not None,
            keep_weights=keep_weights,
        )
    # first: what is printed may go nowhere, and the report is there
    page = sweep_report(folder, csv=csv, result=result)
    _say_result(console, result, page, folder)


def _asked(
    console: Console,
    file: Path | None,
    out: Path | None,
    resume: Path | None,
    change: list[str] | None,
    storage: str | None,
    study: str | None,
    *,
    dry_run: bool,
) -> tuple[SweepSpec, Path]:
    """The sweep that is meant, its precision settled, and its folder.

    Raises:
        ValueError: neither a file nor a folder to go on in, or both; values changed of a sweep that has its own.
    """
    from mue.lab.sweep.state import SweepState

    if (file is None) == (resume is None):
        raise ValueError("mue sweep needs a FILE, or --resume FOLDER to go on with one; not both")
    if resume is not None and out is not None:
        raise ValueError(f"--resume {resume} goes on in that folder: leave --out out")
    folder = resume or out or Path("runs/sweep")
    if file is None and change:
        raise ValueError(f"--set changes a file's values, and the sweep in {folder} has its own: leave --resume out")
    if file is None:
        return SweepState.load(folder).spec, folder
    tables = read_tables(file, change, ("base", "tuned", "data", "run", "sweep"))
    return _settled(console, tables, file.parent, folder, storage, study, dry_run=dry_run), folder


def _settled(
    console: Console,
    tables: dict[str, Any],
    place: Path,
    folder: Path,
    storage: str | None,
    study: str | None,
    *,
    dry_run: bool,
) -> SweepSpec:
    """The sweep of a file's tables, with a precision in the place of "auto": that of its folder or of its shared storage, or the faster."""
    from mue.lab.data.spec import describe_data, open_data
    from mue.lab.sweep.spec import sweep_from
    from mue.lab.sweep.state import shared_sweep
    from mue.lab.train.run import PRECISIONS

    def example(tables: dict[str, Any]) -> tuple[Run, Data]:
        spec = sweep_from(tables, place)
        corpus = open_data(spec.source)
        return spec.first_run(describe_data(spec.source, corpus)), corpus

    def decided(of: Callable[[str], dict[str, Any]]) -> str | None:
        if storage is None:
            return None
        specs = {precision: sweep_from(of(precision), place) for precision in PRECISIONS}
        return shared_sweep(specs, storage, study, open_data(specs["fp32"].source).hash)

    return sweep_from(settled(console, tables, folder, example, decided=decided, dry_run=dry_run), place)


def _say_result(console: Console, result: SweepResult, page: Path, folder: Path) -> None:
    """Print what a sweep found, what speaks against it, and where it is."""
    from mue.lab.sweep.result import tuned_words
    from mue.lab.sweep.sampler import sampler_of

    console.print(f"[bold]{result.verdict}[/]\n{tuned_words(result)}", highlight=False, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    say_paths(console, *result.advice)  # with the names of tables in it
    if why := sampler_of(result.spec.grid).why_done(result.trials):
        console.print(f"the search ended: {why.partition(': ')[0]}", highlight=False)
    say_paths(console, f"report: {page}", f"use it: mue plan FILE.toml --tuned {folder}")


def _say_asked(console: Console, spec: SweepSpec) -> None:
    """Print what a sweep asks for and what it costs, of runs that are done already as of those that are not."""
    from mue.lab.sweep.sampler import sampler_of

    points = sampler_of(spec.grid).points()
    spec.first_run({})  # what no run can be is said here as it would be by the first
    runs = len(points) or spec.grid.trials or 0
    flops = runs * spec.base.flops_per_token * spec.training.tokens
    console.print(
        f"{spec.base.name}: {'' if points else 'at most '}{runs} runs of {spec.training.steps:,} steps with {spec.training.batch:,} tokens,"
        f" {flops / 1e15:.3g} PFLOPs",
        highlight=False,
        soft_wrap=True,
    )
