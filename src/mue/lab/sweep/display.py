"""A sweep in the terminal: one line of blocks for each cell's valley, the runs in progress, and a line for each that ends.

``sweep_table`` is a pure function of the trials: the live table, the table at the end and ``mue report --list`` are one.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mue.lab.report.progress import Pace
from mue.lab.sweep.listener import SweepListener
from mue.lab.sweep.trial import OPEN, Point, Trial
from mue.lab.train.run import Run
from mue.lab.valley.cell import ADAMW_LR, BETAS, CellValues

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 32  # of a valley, so that a row fits into 80: more learning rates than that share columns
_CELLS, _RUNS = 8, 8  # shown; the rest is counted


class SweepDisplay(SweepListener):
    """``with SweepDisplay(console, "sweep", steps) as display: run_sweep(..., listener=display)``.

    A terminal shows a live table; anything else gets plain lines: of each run that ends, and of how far all are every minute.

    Args:
        steps: of a whole run. batch: tokens per step; 0: not shown. pace: of another clock, for tests.
    """

    def __init__(self, console: Console, title: str, steps: int, batch: int = 0, pace: Pace | None = None) -> None:
        self.console, self.title, self.steps, self.batch, self.pace = console, title, steps, batch, pace or Pace()
        self.started = time.monotonic()
        self.trials: Sequence[Trial] = ()
        self.fresh = 0
        """Runs trained in this session."""
        # Transient: what stays on the screen is the line of each run and the table at the end.
        self.live = Live(console=console, get_renderable=self._table, transient=True, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if kind is None and self.trials:
            self.console.print(self._table())

    def look(self, trials: Sequence[Trial]) -> None:
        if not self.trials and (before := sum(t.state in ("COMPLETE", "PRUNED") for t in trials)):
            self.say(f"{before} of {len(trials)} trials were done before")
        self.trials = trials
        done, losses, open_ = 0, [], 0
        for trial in trials:
            reached = (trial.result if trial.state not in OPEN else trial.progress) or {}
            done += int(reached.get("step", 0))
            if trial.state in OPEN:
                open_ += self.steps - int(reached.get("step", 0))
                losses += [reached["loss"]] if "loss" in reached else []
        self.pace.moved(done, done * self.batch)
        if losses and not self.console.is_terminal:
            line = self.pace.line(self.title, done, done + open_, losses[-1])
            if line is not None:
                self.console.print(f"  {line}", highlight=False, soft_wrap=True)

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.fresh += fresh
        when = f"{result.get('seconds', 0):.0f} s" if fresh else "done before"
        tuned = run.plan.tuned
        point = {"lr": tuned.lr, "weight_decay": tuned.weight_decay, "init_std": tuned.init_std}
        if any(name in trial.point for trial in self.trials[:1] for name in BETAS):
            point |= dict(zip(BETAS, tuned.betas, strict=True))
        if tuned.adamw_lr is not None and any(ADAMW_LR in trial.point for trial in self.trials[:1]):
            point[ADAMW_LR] = tuned.adamw_lr
        words = point_words({**point, "seed": run.settings.seed})
        line = f"  {words:<44}  {loss_words(result)}  [dim]{when}, {run.key[:8]}[/]"
        self.console.print(line, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(f"  [dim]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        return sweep_table(self.trials, self.title, self.steps, time.monotonic() - self.started)


def point_words(point: Point) -> str:
    """A trial's point in short words."""
    short = {"weight_decay": "wd", "init_std": "std", "beta1": "β1", "beta2": "β2"}
    return " ".join(f"{short.get(k, k)} {v:.4g}" for k, v in point.items())


def loss_words(result: Mapping[str, Any]) -> str:
    """How a run ended, as rich markup."""
    if result["status"] == "stopped":
        return f"[yellow]stopped[/] at step {result.get('step', 0)}, hopeless"
    loss = result["val_loss"]
    return "[red]diverged[/]" if loss is None else f"loss {loss:.4f}"


def sweep_table(trials: Sequence[Trial], title: str, steps: int, seconds: float | None = None) -> RenderableType:
    """The table of a sweep: how far it is, the best cells with their valleys, the runs in progress.

    Args:
        trials: all of them, ended or not. title: what stands before it. steps: of a whole run.
        seconds: since this worker started; None: of a look from outside.
    """
    count = Counter(t.state for t in trials)
    diverged = sum(t.state == "COMPLETE" and (t.result or {}).get("val_loss") is None for t in trials)
    facts = [f"{count['COMPLETE'] + count['PRUNED']} of {len(trials)} trials"]
    facts += [f"{n} {word}" for n, word in ((diverged, "diverged"), (count["PRUNED"], "stopped early")) if n]
    facts += [f"{n} {word}" for n, word in ((count["RUNNING"], "running"), (count["WAITING"], "waiting")) if n]
    if seconds is not None:
        facts.append(f"{int(seconds) // 60}:{int(seconds) % 60:02d}")
    parts: list[RenderableType] = [Text.assemble((title, "bold"), "  ", " · ".join(facts))]
    cells: dict[CellValues, list[Trial]] = {}
    for trial in trials:
        cells.setdefault(CellValues.of(trial.point), []).append(trial)
    if cells:
        parts.append(_cells(cells))
    running = [t for t in trials if t.state == "RUNNING"]
    if running:
        parts.append(_running(running, steps))
    return Group(*parts)


def _cells(cells: Mapping[CellValues, Sequence[Trial]]) -> Table:
    """The cells with the lowest runs, each with its valley. Nothing is fitted: the table is drawn twice a second."""
    best = {cell: min(found, key=lambda t: t.loss) for cell, found in cells.items()}
    shown = sorted(cells, key=lambda cell: (best[cell].loss, cell))
    floor = min(t.loss for t in best.values())
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = list(next(iter(cells)).columns)
    for name in names:
        table.add_column(f"  {name}" if name == names[0] else name, justify="right")
    table.add_column("valley over lr")
    table.add_column("lowest run", justify="right")
    table.add_column("at lr", justify="right")
    for cell in shown[:_CELLS]:
        loss = best[cell].loss
        found = math.isfinite(loss)
        table.add_row(
            *cell.columns.values(),
            Text(sparkline(cells[cell], floor), style="cyan"),
            f"{loss:.4f}" if found else "–",
            f"{best[cell].point['lr']:.3g}" if found else "–",
        )
    if len(shown) > _CELLS:
        table.add_row(*[""] * len(names), Text(f"and {len(shown) - _CELLS} cells more", style="dim"))
    return table


def sparkline(trials: Sequence[Trial], floor: float) -> str:
    """A cell's losses over log2 lr as blocks, lowest ▁, from ``floor`` up; the seeds of one place are averaged.

    × diverged, ╌ stopped early, ○ running, · waiting. What is far above the valley is cut at █.

    Args:
        trials: of one cell. floor: the lowest loss of all cells, so that their lines compare.
    """
    places: dict[float, list[Trial]] = {}
    for trial in trials:
        places.setdefault(math.log2(trial.point["lr"]), []).append(trial)
    if len(places) > _COLUMNS:
        low, high = min(places), max(places)
        binned: dict[float, list[Trial]] = {}
        for x, found in places.items():
            binned.setdefault(round((x - low) / (high - low) * (_COLUMNS - 1)), []).extend(found)
        places = binned
    ended = {x: [t.loss for t in found if t.state == "COMPLETE"] for x, found in places.items()}
    means = {x: sum(losses) / len(losses) for x, losses in ended.items() if losses}
    finite = sorted(loss for loss in means.values() if math.isfinite(loss))
    low = min(floor, finite[0]) if finite else floor
    # Three times the median's height, so that the valley has most of the blocks; not less than the noise of single runs
    # (0.01 to 0.05 nats in docs/LOG.md), or a flat valley would look rough.
    span = 3 * max(0.02, finite[len(finite) // 2] - low) if finite else 1.0
    return "".join(_mark(places[x], means.get(x), low, span) for x in sorted(places))


def _mark(trials: Sequence[Trial], mean: float | None, low: float, span: float) -> str:
    if mean is None:
        states = {t.state for t in trials}
        return "○" if "RUNNING" in states else "·" if "WAITING" in states else "╌"
    if not math.isfinite(mean):
        return "×"
    return _BLOCKS[min(len(_BLOCKS) - 1, int((mean - low) / span * len(_BLOCKS)))]


def _running(trials: Sequence[Trial], steps: int) -> Table:
    """Who trains what, and how far each run is."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("  running", "step", "loss", "worker"):
        table.add_column(name, justify="right" if name in ("step", "loss") else "left")
    for trial in trials[:_RUNS]:
        reached = trial.progress or {}
        # Two signs of life are missing (Heartbeat.interval is 10 s at most): its worker may be gone.
        quiet = f", {trial.quiet:.0f} s ago" if trial.quiet is not None and trial.quiet > 20 else ""
        table.add_row(
            f"  {point_words(trial.point)}",
            f"{reached.get('step', 0)}/{steps}",
            f"{reached['loss']:.3f}" if "loss" in reached else "",
            Text(f"{(trial.owner or '').rpartition(':')[0]}{quiet}", style="dim"),
        )
    if len(trials) > _RUNS:
        table.add_row(Text(f"  and {len(trials) - _RUNS} more", style="dim"))
    return table
