"""The one sweep: learning rate × weight decay × init std of the base, indexed by Optuna, fitted as valleys.

The truth of every run is its own result file (``mue.lab.run``). Optuna's SQLite study proposes and indexes; if it is
lost it is built again from the results. Rerunning a sweep goes on where it stopped, and a finished run never runs again.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mue.files import digest, write_json
from mue.lab.data import Corpus
from mue.lab.experiment import Grid, SweepSpec, base_plan, described
from mue.lab.pool import Event, run_all
from mue.lab.run import Run, Store
from mue.lab.train import batches_of
from mue.lab.valley import Point, Valley, fit_valley
from mue.shapes import HParams, Training, Transformer, shape_from_dict

if TYPE_CHECKING:
    import optuna

AXES = ("lr", "weight_decay", "init_std")
Values = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """All runs with one weight decay and init std, and the valley fitted over their learning rates."""

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
    """A finished sweep: its cells, the best of them, and the tuned values."""

    cells: tuple[Cell, ...]
    best: Cell
    tuned: HParams
    runs: int
    diverged: int

    @property
    def verdict(self) -> str:
        """The best cell's valley in a sentence."""
        assert self.best.valley is not None
        return f"weight decay {self.best.weight_decay:g}, init std {self.best.init_std:g}: {self.best.valley.verdict}"


def sweep_run(spec: SweepSpec, values: Values, seed: int, data: dict[str, Any]) -> Run:
    """One run of a sweep: the base with these values, every transfer factor 1."""
    from dataclasses import replace

    tuned = spec.defaults.replace(**{axis: values[axis] for axis in AXES})
    plan = base_plan(spec.base, spec.training, tuned)
    return Run(plan, replace(spec.settings, seed=seed), data)


def sweep_runs(spec: SweepSpec, data: dict[str, Any]) -> list[Run]:
    """Every run of a grid, in the order they are started; of a sampler's search, none before it proposes them."""
    return [sweep_run(spec, values, seed, data) for values, seed in grid_points(spec.grid)]


def grid_points(grid: Grid) -> list[tuple[Values, int]]:
    """(values, seed) of every combination; empty where a sampler proposes instead."""
    if grid.sampler != "grid":
        return []
    points = itertools.product(grid.init_std, grid.weight_decay, grid.lr, grid.seeds)
    return [({"lr": lr, "weight_decay": wd, "init_std": std}, seed) for std, wd, lr, seed in points]


def identity(spec: SweepSpec, data_hash: str) -> dict[str, Any]:
    """What must not change under a sweep's folder: all but the grid and the seeds."""
    from dataclasses import asdict

    fixed = {k: v for k, v in spec.defaults.to_dict().items() if k not in AXES}
    settings = {k: v for k, v in asdict(spec.settings).items() if k != "seed"}
    training = {"batch": spec.training.batch, "steps": spec.training.steps}
    return {"base": spec.base.to_dict(), "training": training, "tuned": fixed, "settings": settings, "data": data_hash}


def open_store(out: Path, spec: SweepSpec, data_hash: str) -> Store:
    """The sweep's folder, new or its own; ``ValueError`` naming what differs if it belongs to another experiment."""
    own = identity(spec, data_hash)
    path = out / "sweep.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another folder with --out, or remove it") from error
        if digest(stored) != digest(own):
            wrong = [k for k in own if digest(stored.get(k)) != digest(own[k])]
            raise ValueError(
                f"{out} holds a sweep of another experiment ({', '.join(wrong)} differ): choose another folder with --out"
            )
    else:
        write_json(path, {"identity": own})
    return Store(out)


def run_sweep(
    spec: SweepSpec,
    out: Path,
    corpus: Corpus,
    *,
    workers: int | None = None,
    on_event: Event | None = None,
    on_done: Callable[[Run, dict[str, Any]], None] | None = None,
    checkpoint_seconds: float = 10.0,
) -> Swept:
    """Run what is missing of the sweep and fit it; the result is also written to ``out/result.json``.

    Raises:
        ValueError: the folder belongs to another experiment; every run diverged. mue.lab.run.BusyError: it is being swept.
    """
    data = described(spec.source, corpus)
    first = {axis: getattr(spec.grid, axis)[0] for axis in AXES}
    batches_of(sweep_run(spec, first, spec.grid.seeds[0], data), corpus)  # before the folder is made
    store = open_store(out, spec, corpus.hash)
    with store.locked("sweep"):
        index = _Index(out, digest(identity(spec, corpus.hash)), spec.grid)
        found: dict[str, tuple[Values, int, dict[str, Any]]] = {}

        for batch in _batches(spec.grid, index, workers or 1):
            runs = {r.key: (v, s, r) for v, s in batch for r in [sweep_run(spec, v, s, data)]}
            trials = {key: index.trial(key, values, seed) for key, (values, seed, _) in runs.items()}

            def done(
                run: Run, result: dict[str, Any], runs: dict[str, Any] = runs, trials: dict[str, int] = trials
            ) -> None:
                values, seed, _ = runs[run.key]
                found[run.key] = (values, seed, result)
                index.tell(trials[run.key], result)
                if on_done:
                    on_done(run, result)

            run_all(
                [run for _, _, run in runs.values()],
                store,
                workers=workers,
                on_event=on_event,
                on_done=done,
                checkpoint_seconds=checkpoint_seconds,
            )
        swept = summarise(spec, list(found.values()))
        write_json(out / "result.json", swept_dict(swept, spec, corpus.hash))
        return swept


def _batches(grid: Grid, index: _Index, workers: int) -> Any:
    """Lists of (values, seed) to run together: the whole grid, or a sampler's proposals as it learns."""
    if grid.sampler == "grid":
        yield grid_points(grid)
        return
    yield index.known()
    while (left := (grid.trials or 0) - index.count) > 0:  # a point proposed twice is one run, but two trials
        yield [index.propose() for _ in range(min(left, workers))]


class _Index:
    """Optuna's view of a sweep: one trial for each run, keyed by the run's key."""

    def __init__(self, out: Path, name: str, grid: Grid) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {"grid": optuna.samplers.RandomSampler, "random": optuna.samplers.RandomSampler}
        sampler = samplers.get(grid.sampler, optuna.samplers.TPESampler)(seed=0)
        self.grid = grid
        self.study = optuna.create_study(
            storage=f"sqlite:///{out / 'optuna.db'}", study_name=name, sampler=sampler, load_if_exists=True
        )
        self.complete = optuna.trial.TrialState.COMPLETE
        trials = self.study.get_trials(deepcopy=False)
        self.numbers = {
            t.user_attrs["run"]: t.number for t in trials if "run" in t.user_attrs and "seed" in t.user_attrs
        }
        self.done = {t.number for t in trials if t.state == self.complete}
        self.count = len(self.numbers)  # trials that stand for a run, proposed twice or not
        self.proposed: dict[tuple[float, ...], int] = {}

    def trial(self, key: str, values: Values, seed: int) -> int:
        """The trial of a run, made if there is none (a new grid point, or an index that was lost)."""
        if key not in self.numbers:
            number = self.proposed.get((*values.values(), seed))
            if number is None:
                self.study.enqueue_trial({**values, "seed": seed})
                number = self._ask()[0]
            self.study._storage.set_trial_user_attr(self.study.trials[number]._trial_id, "run", key)
            self.numbers[key] = number
        return self.numbers[key]

    def _ask(self) -> tuple[int, Values, int]:
        trial = self.study.ask()
        values = {axis: self._suggest(trial, axis) for axis in AXES}
        drawn = trial.suggest_int("seed", min(self.grid.seeds), max(self.grid.seeds))
        # A sampler draws from the range of the seeds; the run takes the listed one nearest to it.
        seed = min(self.grid.seeds, key=lambda listed: abs(listed - drawn))
        trial.set_user_attr("seed", seed)
        self.count += 1
        return trial.number, values, seed

    def _suggest(self, trial: optuna.Trial, axis: str) -> float:
        points = getattr(self.grid, axis)  # a range rather than a list, so that a grid may be widened later
        return float(trial.suggest_float(axis, points[0], points[-1], log=points[0] > 0 and len(points) > 1))

    def propose(self) -> tuple[Values, int]:
        """The sampler's next point."""
        number, values, seed = self._ask()
        self.proposed[(*values.values(), seed)] = number
        return values, seed

    def known(self) -> list[tuple[Values, int]]:
        """Every point that has a trial with a run."""
        kept = set(self.numbers.values())
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.number in kept]
        return [({axis: t.params[axis] for axis in AXES}, int(t.user_attrs["seed"])) for t in trials]

    def tell(self, number: int, result: dict[str, Any]) -> None:
        """A result for the index; a diverged run counts as infinitely bad, not as missing."""
        if number not in self.done:
            value = result["val_loss"]
            self.study.tell(number, math.inf if value is None else value)
            self.done.add(number)


def summarise(spec: SweepSpec, found: Sequence[tuple[Values, int, dict[str, Any]]]) -> Swept:
    """Fit a valley in each (weight decay, init std) cell; the deepest fitted minimum wins.

    The tuned lr is the fitted minimum, held inside the grid (an edge is reported by the valley's verdict).
    """
    groups: dict[tuple[float, float], list[Point]] = {}
    for values, seed, result in found:
        loss = math.inf if result["val_loss"] is None else result["val_loss"]
        cell = groups.setdefault((values["weight_decay"], values["init_std"]), [])
        cell.append(Point(math.log2(values["lr"]), loss, seed))
    cells = tuple(_cell(wd, std, points) for (wd, std), points in sorted(groups.items()))
    fitted = [cell for cell in cells if cell.valley is not None]
    if not fitted:
        raise ValueError("every run of the sweep diverged: lower the learning rates under [sweep] lr")
    best = min(fitted, key=lambda cell: cell.depth)
    assert best.valley is not None
    low, high = min(p.log2_lr for p in best.points), max(p.log2_lr for p in best.points)
    lr = 2.0 ** min(max(best.valley.minimum, low), high)
    tuned = spec.defaults.replace(lr=lr, weight_decay=best.weight_decay, init_std=best.init_std)
    diverged = sum(1 for _, _, result in found if result["status"] == "diverged")
    return Swept(cells, best, tuned, len(found), diverged)


def _cell(wd: float, std: float, points: list[Point]) -> Cell:
    points = sorted(points, key=lambda p: (p.log2_lr, p.seed))
    try:
        return Cell(wd, std, tuple(points), fit_valley(points))
    except ValueError:  # no finite point at all
        return Cell(wd, std, tuple(points), None)


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


def swept_dict(swept: Swept, spec: SweepSpec, data_hash: str) -> dict[str, Any]:
    """What ``result.json`` of a sweep holds."""
    return {
        "tuned": swept.tuned.to_dict(),
        "verdict": swept.verdict,
        "edge": swept.best.valley.edge if swept.best.valley else None,
        "runs": swept.runs,
        "diverged": swept.diverged,
        "identity": identity(spec, data_hash),
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
    """What a finished sweep says: its values, at which edge of its grid they lie, on which base and run they were tuned."""

    tuned: HParams
    edge: str | None
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
        return Found(tuned, data.get("edge"), shape_from_dict(identity["base"]), Training(**identity["training"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a sweep ({error}): run the sweep again") from error
