"""``mue study`` and ``mue study report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mue.cli.app import KeepWeights, Workers, app, say_data, say_kept, say_paths
from mue.cli.files import Set, change_tables, read_tables
from mue.cli.precision import settled

if TYPE_CHECKING:  # a study's modules need torch, and a command imports what it calls when it runs
    from mue.lab.data import Data
    from mue.lab.study.schedule import Planned, Rows, Schedule
    from mue.lab.study.spec import StudySpec
    from mue.lab.train.run import Run


class _RunByDefault(TyperGroup):
    """A group whose first word, where it names no command of it, belongs to ``run``: ``mue study FILE`` is ``mue study run FILE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_RunByDefault,
    help="Train targets with transferred values and around them, by every approach side by side; say what the transfer was worth.",
)
app.add_typer(group, name="study")

_File = Annotated[
    Path | None, typer.Argument(help="A TOML file; without one the study that comes with mue.", show_default=False)
]
_Axis = Annotated[list[str] | None, typer.Option("--axis", help="Only this axis; may be given several times.")]
_Small = Annotated[
    bool, typer.Option("--small", help="A quarter of an hour on two cores, d16 → d64: shows the method, has no power.")
]
_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; rerun with the same to go on.")]
_Minutes = Annotated[float | None, typer.Option("--minutes", min=0, help="Begin no run after so many minutes.")]
_Dry = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be trained and what it costs, and train nothing.")
]
_Folders = Annotated[
    list[Path], typer.Argument(help="A study's folder, and others of the same study whose rows to take over.")
]


@group.command()
def run(
    file: _File = None,
    axis: _Axis = None,
    small: _Small = False,
    out: _Out = Path("runs/study"),
    workers: Workers = None,
    minutes: _Minutes = None,
    dry_run: _Dry = False,
    keep_weights: KeepWeights = False,
    change: Set = None,
) -> None:
    """Train a study's runs, the transferred values first, and write its report.

    Finished runs are never run again, and approaches that agree share theirs. Kill it, start it again, start it twice in one
    folder; give several machines folders of their own and join them with mue study report A B C.

    \b
    [bold]Example[/]
      mue study --axis width --small
      mue study study.toml -o runs/s --minutes 60
      mue study --small --set 'study.seeds=\\[0]' -o runs/one
      mue study report runs/s

    \b
    [bold]study.toml[/]
      \\[data]
      source = "stdlib"
      \\[base]                 # as in a plan file
      width = 32
      ffn = 32
      layers = 2
      head_dim = 16
      sequence = 128
      \\[base.training]
      batch = 4096            # tokens per step
      steps = 640
      \\[tuned]                # what a sweep of the base found
      lr = 0.008
      weight_decay = 0.1
      init_std = 0.06
      \\[study]
      seeds = \\[0, 1]
      multipliers = \\[0.5, 1, 2]   # of the transferred rate; widened where the lowest lies at an end ...
      reach = 8                    # ... up to 8 times
      \\[approaches.complete-mue]
      \\[approaches.standard]
      \\[approaches.betas-carried]
      rule = "complete-mue"
      options = { betas = "linear" }
      \\[axes.width]           # a target is the base, changed in these keys
      targets = \\[{ width = 64, ffn = 64 }, { width = 128, ffn = 128 }]
      \\[axes.duration]
      targets = \\[{ steps = 160 }, { steps = 2560 }]
    """
    from mue.lab.data.spec import describe_data, open_data
    from mue.lab.report.progress import RunProgress
    from mue.lab.study.report import study_report
    from mue.lab.study.rows import StudyFolder
    from mue.lab.study.run import run_study
    from mue.lab.study.schedule import Schedule

    console = Console()
    spec = _asked(console, file, small, out, change, dry_run=dry_run).on(tuple(axis or ()))
    corpus = open_data(spec.source)
    say_data(console, corpus)
    schedule = Schedule(spec, describe_data(spec.source, corpus))
    folder = StudyFolder(out)
    missing = _say_asked(console, schedule, folder.rows())
    if small:
        console.print(
            "[yellow]without power:[/] models this small and runs this short show the method and decide nothing",
            highlight=False,
        )
    if dry_run:
        say_kept(console, spec.source)
        return
    label = {p.run.key: p.name for p in missing}
    with RunProgress(console, "study", [p.run for p in missing], lambda r: label.get(r.key, "wider")) as progress:
        left = run_study(
            schedule, folder, workers=workers, minutes=minutes, listener=progress, keep_weights=keep_weights
        )
    if left:
        console.print(f"{left} runs are left: start it again with --out {out}", highlight=False, soft_wrap=True)
    say_paths(console, f"report: {study_report(out)}")


def _asked(
    console: Console, file: Path | None, small: bool, out: Path, change: list[str] | None, *, dry_run: bool
) -> StudySpec:
    """The study that is meant, its precision settled: a file's, or the one that comes with mue, whose data are kept in the study's folder.

    Raises:
        ValueError: a file that is to be small.
    """
    from mue.lab.data.spec import describe_data, open_data
    from mue.lab.study.schedule import Schedule
    from mue.lab.study.shipped import shipped_study
    from mue.lab.study.spec import TOP, study_from

    if file is not None and small:
        raise ValueError("--small is the small form of mue's own study: leave it or the FILE out")
    if file is not None:
        tables, place = read_tables(file, change, TOP, known=TOP), file.parent
    else:
        tables, place = change_tables(shipped_study(small=small, cache=out / "data"), change, TOP, known=TOP), Path()

    def largest(tables: dict[str, Any]) -> tuple[Run, Data]:
        """The run in which most of the study's time goes: that decides for all, since precisions are not to be mixed in a comparison."""
        spec = study_from(tables, place)
        corpus = open_data(spec.source)
        runs = Schedule(spec, describe_data(spec.source, corpus)).missing({})
        return max((p.run for p in runs), key=lambda run: run.plan.target.flops_per_token), corpus

    return study_from(settled(console, tables, out, largest, dry_run=dry_run), place)


def _say_asked(console: Console, schedule: Schedule, rows: Rows) -> list[Planned]:
    """Print what a study asks for: cells without an answer, how many runs are left, what they cost.

    Returns:
        The runs that are left.
    """
    missing = schedule.missing(rows)
    for cell in schedule.cells:
        if cell.refused:
            console.print(
                f"{cell.target.axis}, {cell.target.name}: {cell.approach.name} has no answer: {cell.refused}",
                highlight=False,
                soft_wrap=True,
            )
    flops = sum(p.cell.target.shape.flops_per_token * p.cell.target.training.tokens for p in missing)
    console.print(
        f"{len(missing)} runs to train ({len(rows)} done), {flops / 1e15:.3g} PFLOPs; more where a valley has no other side yet",
        highlight=False,
    )
    return missing


@group.command()
def report(folders: _Folders) -> None:
    """Write the report of a study, from whatever rows there are; rows of further folders are taken over first."""
    from mue.lab.study.report import study_report

    first, *others = folders
    say_paths(Console(), f"report: {study_report(first, others)}")
