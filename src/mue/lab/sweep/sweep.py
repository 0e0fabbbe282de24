"""The one sweep: learning rate × weight decay × init std of the base, by any number of workers, fitted as valleys.

The trials are in a storage that all workers share (``mue.lab.sweep.storage``); a folder holds what belongs to one machine:
checkpoints, metrics, the report. Rerunning a sweep goes on where it stopped, and a finished run never runs again: if the
storage is lost, the results in the folder's runs are found and told anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data
from mue.lab.runners.open import open_runner
from mue.lab.runners.runner import Runner
from mue.lab.sweep.points import AXES, grid_points
from mue.lab.sweep.spec import SweepSpec, base_plan
from mue.lab.sweep.storage import Database, MissingError, Trouble, without_password
from mue.lab.sweep.trials import OPEN, Trial, Trials, name_of
from mue.lab.sweep.worker import Watch, Worker
from mue.lab.train.run import Run, Store
from mue.lab.train.task import task_of
from mue.lab.valley.fit import Point, Valley, fit_valley
from mue.shapes import HParams, Training, Transformer, shape_from_dict
from mue.util.files import digest, write_json

# Cells that are fitted, and of a sweep of so many runs: a fit takes tens of milliseconds, and the deepest valley is not in a
# cell whose every run is high.
FITTED, MANY, FITTED_OF_MANY = 32, 1_000, 8
# Of the losses' spread: of 1,045 parts of recorded sweeps one fit, of three runs, went so far below its runs.
_DIP = 0.5


@dataclass(frozen=True)
class Cell:
    """All runs with one weight decay and init std, and the valley fitted over their learning rates.

    ``valley`` is None where no run has a loss, and in a sweep of many cells where others lie lower.
    """

    weight_decay: float
    init_std: float
    points: tuple[Point, ...]
    valley: Valley | None

    @property
    def depth(self) -> float:
        """Loss at the fitted minimum; inf where nothing could be fitted."""
        return self.valley.loss_at_minimum if self.valley else math.inf


@dataclass(frozen=True)
class Swept:
    """A finished sweep: what was asked for, its cells, the best of them, and the tuned values."""

    spec: SweepSpec
    cells: tuple[Cell, ...]
    best: Cell
    tuned: HParams
    runs: int
    diverged: int
    stopped: int
    """Hopeless runs that were given up early: no loss, but known to be high where they are, as a diverged run is."""
    trials: tuple[Trial, ...]
    """What it was fitted from, and whatever else the storage holds."""

    @property
    def verdict(self) -> str:
        """The best cell's valley in a sentence."""
        valley = self.best.valley
        assert valley is not None
        return f"weight decay {self.best.weight_decay:g}, init std {self.best.init_std:g}: {valley.verdict}"

    @property
    def warnings(self) -> list[str]:
        """What speaks against the tuned values."""
        valley, losses = self.best.valley, [p.loss for p in self.best.points if math.isfinite(p.loss)]
        assert valley is not None
        found = [valley.warning] if valley.warning else []
        used = [p.loss for p in valley.used]
        if not valley.curve:
            found.append(f"no valley was fitted: the tuned values are the lowest run's, with loss {min(losses):.4f}")
        elif valley.loss_at_minimum < max(0.0, min(used) - _DIP * (max(used) - min(used))):
            found.append(
                f"the fitted loss at the minimum, {valley.loss_at_minimum:.3g}, lies far below every run's (the lowest is"
                f" {min(used):.3g}): train one there before you believe it"
            )
        guessing = math.log(self.spec.base.vocab)
        if min(losses) >= guessing:
            found.append(
                f"no run got below {guessing:.2f} nats, the loss of guessing among {self.spec.base.vocab} tokens:"
                " the learning rates or the text are wrong, or the training is too short"
            )
        return found


def sweep_run(spec: SweepSpec, point: Mapping[str, float], data: dict[str, Any]) -> Run:
    """One run of a sweep: the base with a point's values and seed, every transfer factor 1."""
    tuned = spec.defaults.replace(**{k: v for k, v in point.items() if k != "seed"})
    plan = base_plan(spec.base, spec.training, tuned)
    return Run(plan, replace(spec.settings, seed=int(point["seed"])), data)


def identity(spec: SweepSpec, data_hash: str) -> dict[str, Any]:
    """What must not change under a sweep's folder: all but the grid and the seeds."""
    fixed = {k: v for k, v in spec.defaults.to_dict().items() if k not in AXES}
    settings = {k: v for k, v in spec.settings.to_dict().items() if k != "seed"}
    training = {"batch": spec.training.batch, "steps": spec.training.steps}
    return {"base": spec.base.to_dict(), "training": training, "tuned": fixed, "settings": settings, "data": data_hash}


@dataclass(frozen=True)
class Stored:
    """What a sweep's folder knows of it. ``storage``: None for a file of the folder's own."""

    spec: SweepSpec
    identity: dict[str, Any]
    storage: str | None

    def trials(self, folder: Path) -> Trials:
        """The sweep's trials, from the storage, to be read: nothing is written. ``ValueError`` where they are lost."""
        try:
            return open_trials(folder, self.identity, self.storage, make=False)
        except MissingError as error:
            again = f"mue sweep --resume {folder} finds the results in the folder and tells them anew"
            raise ValueError(f"{error}, or: {again}") from error


def stored_sweep(folder: Path) -> Stored:
    """The sweep in a folder. ``ValueError`` where there is none."""
    path = folder / "sweep.json"
    again = f"start it with mue sweep FILE --out {folder}"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Stored(SweepSpec.from_dict(stored["spec"]), stored["identity"], stored["storage"])
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no sweep (no sweep.json): {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole sweep's ({type(error).__name__}: {error}): {again}") from error


def adopt(folder: Path, storage: str, study: str | None) -> None:
    """Make ``folder`` one of a sweep in a shared storage, on a machine that has had no part in it.

    Raises:
        ValueError: the folder holds a sweep already; the storage holds none, or several and ``study`` names none of them.
    """
    if (folder / "sweep.json").exists():
        raise ValueError(
            f"{folder} holds a sweep, which knows its storage: leave --storage out, or name another folder"
        )
    database = Database(storage, make=False)
    found = {name: json.loads(about) for name, about in database.studies("sweep").items()}
    if not found:
        raise ValueError(f"{database.name} holds no sweep")
    if study not in found and (study or len(found) > 1):
        words = [f"{name} ({_words(about['identity'])})" for name, about in found.items()]
        raise ValueError(f"choose one of the sweeps in {database.name} with --study:\n  " + "\n  ".join(words))
    write_json(folder / "sweep.json", {**found[study or next(iter(found))], "storage": database.name})


def _words(identity: dict[str, Any]) -> str:
    training = identity["training"]
    return f"{shape_from_dict(identity['base']).name}, {training['steps']} steps of {training['batch']} tokens"


def check_folder(out: Path, spec: SweepSpec, corpus: Corpus, storage: str | None) -> str | None:
    """The storage of the sweep in ``out``: what the folder says, or ``storage`` for a new one.

    Raises:
        ValueError: the folder belongs to another experiment or storage; the data is too short for a new one.
    """
    path, own = out / "sweep.json", identity(spec, corpus.hash)
    if not path.exists():
        point = {**{axis: getattr(spec.grid, axis)[0] for axis in AXES}, "seed": spec.grid.seeds[0]}
        run = sweep_run(spec, point, describe_data(spec.source, corpus))
        task_of(spec.settings).batches(run, corpus)  # before the folder is made
        return storage
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before, kept = stored["identity"], stored.get("storage")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another folder with --out, or remove it") from error
    if digest(before) != digest(own):
        wrong = [k for k in own if digest(before.get(k)) != digest(own[k])]
        raise ValueError(
            f"{out} holds a sweep of another experiment ({', '.join(wrong)} differ): choose another folder with --out"
        )
    if storage is not None and without_password(storage) != kept:
        raise ValueError(
            f"the trials of {out} are in {kept or 'its own file'}, not in {without_password(storage)}: choose another folder with --out"
        )
    return storage or kept


def open_trials(
    out: Path,
    identity: dict[str, Any],
    storage: str | None,
    lease: float | None = None,
    trouble: Trouble | None = None,
    make: bool = True,
) -> Trials:
    """The trials of a sweep in ``storage``, by default an SQLite file in its folder. ``make``: where there are none yet."""
    database = Database(storage or f"sqlite:///{out.absolute() / 'optuna.db'}", trouble=trouble, make=make)
    return Trials(database, digest(identity), lease, make=make)


def as_asked(spec: SweepSpec, trials: Trials) -> SweepSpec:
    """The sweep with the grid of the file that was started last, on whatever machine: that is what is asked for.

    How this machine lays out its runs stays its own.
    """
    about = trials.described()
    if about is None:
        return spec
    try:
        grid = SweepSpec.from_dict(about["spec"]).grid
    except (KeyError, TypeError, ValueError) as error:
        name = trials.database.name
        raise ValueError(
            f"{name} was last used by another version of mue ({error}): use the same on all machines"
        ) from error
    return replace(spec, grid=replace(grid, runner=spec.grid.runner))


def run_sweep(
    spec: SweepSpec,
    out: Path,
    corpus: Corpus,
    *,
    storage: str | None = None,
    lease: float | None = None,
    workers: int | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = 10.0,
    resume: bool = False,
) -> Swept:
    """Work on the sweep until every trial has ended, together with whoever shares its storage, and fit it.

    ``out``: this machine's folder: checkpoints, metrics, and in the end ``result.json``. Workers on one machine may share it.
    ``resume``: the grid is not ``spec``'s but that of whoever started last.

    Raises:
        ValueError: the folder belongs to another experiment; every run diverged. mue.lab.sweep.storage.StorageError: it was lost.
    """
    watch = watch or Watch()
    storage = check_folder(out, spec, corpus, storage)
    data, own = describe_data(spec.source, corpus), identity(spec, corpus.hash)
    trials = open_trials(out, own, storage, lease, partial(_trouble, watch))
    before = as_asked(spec, trials).grid
    spec = replace(spec, grid=before) if resume else spec
    kept = None if storage is None else trials.database.name
    about = {"identity": own, "spec": spec.to_dict()}
    write_json(out / "sweep.json", {**about, "storage": kept})
    points = grid_points(spec.grid)
    only = bool(points or grid_points(before))  # else what waits belongs to a search, which knows its points by itself
    if gone := trials.ask(about, points, only=only):
        watch.say(f"{gone} open trials are not in the file any more: withdrawn")
    store, kind = Store(out), spec.grid.runner

    def open_for(run: Run) -> Runner:
        left = sum(t.state in OPEN for t in trials.all())
        runner = open_runner(
            kind, store, workers=workers, checkpoint_seconds=checkpoint_seconds, example=run, runs=max(1, left)
        )
        watch.say(runner.why)
        return runner

    while True:
        worker = Worker(spec.grid, trials, store, partial(sweep_run, spec, data=data), open_for, watch)
        ended = worker.work()
        now = as_asked(spec, trials)
        if now.grid == spec.grid:
            break
        spec = now  # somebody asked for something else meanwhile, which may not have ended
    swept = summarise(spec, ended)
    write_json(out / "sweep.json", {"identity": own, "spec": spec.to_dict(), "storage": kept})
    write_json(out / "result.json", swept_dict(swept, corpus.hash))
    return swept


def _trouble(watch: Watch, what: str, seconds: float) -> None:
    watch.say(
        f"the storage does not answer ({what}), for {seconds:.0f} s now: it is asked again, and what trains goes on"
    )


def counted(spec: SweepSpec, trials: Sequence[Trial]) -> list[Trial]:
    """The ended trials that count: of a grid what is in the file, of a search every one."""
    asked = {name_of(point) for point in grid_points(spec.grid)}
    return [t for t in trials if t.result is not None and (not asked or t.name in asked)]


def summarise(spec: SweepSpec, trials: Sequence[Trial]) -> Swept:
    """Fit a valley in each (weight decay, init std) cell; the deepest fitted minimum wins.

    The tuned lr is the fitted minimum, held inside the grid (an edge is reported by the valley's verdict).

    Raises:
        ValueError: no run has a loss.
    """
    ended = counted(spec, trials)
    found = [t for t in ended if t.state == "COMPLETE"]
    groups: dict[tuple[float, float], list[Point]] = {}
    for trial in ended:
        cell = groups.setdefault((trial.point["weight_decay"], trial.point["init_std"]), [])
        cell.append(Point(math.log2(trial.point["lr"]), trial.loss, trial.seed))
    lowest = sorted(groups, key=lambda cell: (min(p.loss for p in groups[cell]), cell))
    lowest = lowest[: FITTED_OF_MANY if len(found) > MANY else FITTED]
    cells = tuple(_cell(*cell, groups[cell], fit=cell in lowest) for cell in sorted(groups))
    fitted = [cell for cell in cells if cell.valley is not None]
    if not fitted:
        raise ValueError("every run of the sweep diverged: lower the learning rates under [sweep] lr")
    best = min(fitted, key=lambda cell: cell.depth)
    assert best.valley is not None
    low, high = min(p.log2_lr for p in best.points), max(p.log2_lr for p in best.points)
    lr = 2.0 ** min(max(best.valley.minimum, low), high)
    tuned = spec.defaults.replace(lr=lr, weight_decay=best.weight_decay, init_std=best.init_std)
    diverged = sum(not math.isfinite(trial.loss) for trial in found)
    return Swept(spec, cells, best, tuned, len(found), diverged, len(ended) - len(found), tuple(trials))


def _cell(wd: float, std: float, points: list[Point], *, fit: bool) -> Cell:
    ordered = tuple(sorted(points, key=lambda p: (p.log2_lr, p.seed)))
    finite = any(math.isfinite(p.loss) for p in ordered)
    return Cell(wd, std, ordered, fit_valley(ordered) if fit and finite else None)


def tuned_words(tuned: HParams) -> str:
    """What a sweep found, in a line."""
    return f"tuned: lr {tuned.lr:.4g}, weight decay {tuned.weight_decay:g}, init std {tuned.init_std:g}"


def valley_dict(valley: Valley | None) -> dict[str, Any] | None:
    """A valley for JSON: infinite bounds become null."""
    if valley is None:
        return None

    def finite(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {
        "minimum_log2_lr": finite(valley.minimum),
        "lr": 2.0**valley.minimum if math.isfinite(valley.minimum) else None,
        "interval_log2_lr": [finite(x) for x in valley.interval],
        "loss": finite(valley.loss_at_minimum),
        "curvature": finite(valley.curvature),
        "noise": finite(valley.noise),
        "edge": valley.edge,
        "warning": valley.warning,
        "verdict": valley.verdict,
    }


def swept_dict(swept: Swept, data_hash: str) -> dict[str, Any]:
    """What ``result.json`` of a sweep holds."""
    return {
        "tuned": swept.tuned.to_dict(),
        "verdict": swept.verdict,
        "warnings": swept.warnings,
        "edge": swept.best.valley.edge if swept.best.valley else None,
        "runs": swept.runs,
        "diverged": swept.diverged,
        "stopped": swept.stopped,
        "identity": identity(swept.spec, data_hash),
        "asked": asdict(swept.spec.grid),
        "cells": [
            {
                "weight_decay": cell.weight_decay,
                "init_std": cell.init_std,
                "points": [
                    {"lr": 2.0**p.log2_lr, "seed": p.seed, "loss": p.loss if math.isfinite(p.loss) else None}
                    for p in cell.points
                ],
                "valley": valley_dict(cell.valley),
            }
            for cell in swept.cells
        ],
    }


@dataclass(frozen=True)
class Found:
    """What a finished sweep says: its values, what speaks against them, on which base and run they were tuned."""

    tuned: HParams
    notes: tuple[str, ...]
    base: Transformer
    training: Training


def tuned_of(folder: Path) -> Found:
    """The result of a finished sweep.

    Raises:
        ValueError: the folder holds no finished sweep, or a file that is not one's result.
    """
    path = folder / "result.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no finished sweep (no result.json): run mue sweep with --out {folder} first")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tuned = HParams(**{**data["tuned"], "betas": tuple(data["tuned"]["betas"])})
        identity = data["identity"]
        notes = list(data.get("warnings", ()))
        if data.get("edge"):
            notes.append(
                f"this sweep's best lr is at the {data['edge']} edge of its grid: widen it before you trust it"
            )
        if _changed(folder, data.get("asked")):
            notes.append(f"this sweep has been changed since: finish it with mue sweep --resume {folder}")
        return Found(tuned, tuple(notes), shape_from_dict(identity["base"]), Training(**identity["training"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a sweep ({error}): run the sweep again") from error


def _changed(folder: Path, asked: Mapping[str, Any] | None) -> bool:
    """Whether the folder's sweep asks for something else than it did when this result was made."""
    if asked is None or not (folder / "sweep.json").exists():
        return False
    return digest({**asdict(stored_sweep(folder).spec.grid), "runner": None}) != digest({**asked, "runner": None})
