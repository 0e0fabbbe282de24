"""What a sweep found: a valley in each cell, the deepest of them, and the tuned values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mue.lab.sweep.spec import SweepSpec
from mue.lab.sweep.trial import Trial
from mue.lab.train.task import task_of
from mue.lab.valley import LossPoint, Valley, fit_valley
from mue.lab.valley.cell import ADAMW_LR, CellValues
from mue.plan.notes import long_averages
from mue.shapes import HParams

# Cells that are fitted, and of a sweep of so many runs: a fit takes tens of milliseconds, a report of 10,000 trials is
# to take two seconds (docs/results/trials.json), and the deepest valley is not in a cell whose every run is high.
FITTED, MANY, FITTED_OF_MANY = 32, 1_000, 8
# Of the losses' spread: of 1,045 parts of recorded sweeps one fit, of three runs, went so far below its runs.
_DIP = 0.5


@dataclass(frozen=True)
class Cell:
    """All runs with one weight decay and init std (and pair of betas, and AdamW's lr), and the valley fitted over their learning rates.

    Attributes:
        values: what they share.
        points: by learning rate, then seed. valley: None where no run has a loss, and in a sweep of many cells where others lie lower.
    """

    values: CellValues
    points: tuple[LossPoint, ...]
    valley: Valley | None

    @property
    def depth(self) -> float:
        """Loss at the fitted minimum; inf where nothing could be fitted."""
        return self.valley.loss_at_minimum if self.valley else math.inf

    @property
    def lowest(self) -> float:
        """Loss of the best run; inf where none has one."""
        return min(p.loss for p in self.points)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a run without a loss has null."""
        return {
            **self.values.tuned,
            "points": [
                {"lr": 2.0**p.log2_lr, "seed": p.seed, "loss": p.loss if math.isfinite(p.loss) else None}
                for p in self.points
            ],
            "valley": self.valley and self.valley.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that :meth:`to_dict` wrote."""
        points = tuple(
            LossPoint(math.log2(p["lr"]), math.inf if p["loss"] is None else p["loss"], p["seed"])
            for p in data["points"]
        )
        valley = data["valley"] and Valley.from_dict(data["valley"], points)
        rate = (data[ADAMW_LR],) if ADAMW_LR in data else ()
        values = CellValues(data["weight_decay"], data["init_std"], tuple(data.get("betas", ())), rate)
        return cls(values, points, valley)


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        spec: what was asked for. cells: in the order of their values. best: the deepest of them. tuned: the values it gives.
        runs, diverged: how many ran to their end, and how many of these have no loss.
        stopped: how many were given up early as hopeless: no loss, but known to be high where they are, as a diverged run is.
        trials: what it was fitted from, and whatever else the storage holds.
    """

    spec: SweepSpec
    cells: tuple[Cell, ...]
    best: Cell
    tuned: HParams
    runs: int
    diverged: int
    stopped: int
    trials: tuple[Trial, ...]

    @property
    def verdict(self) -> str:
        """The best cell's valley in a sentence."""
        valley = self.best.valley
        assert valley is not None
        return f"{self.best.values}: {valley.verdict}"

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
        task = task_of(self.spec.settings)
        guessing = task.baseline_loss(self.spec.base)
        if min(losses) >= guessing:
            found.append(
                f"no run got below {guessing:.2f} {task.unit}, the loss of guessing: the learning rates or the data are wrong,"
                " or the training is too short"
            )
        return found

    @property
    def advice(self) -> list[str]:
        """What the sweep did not look for and might have. No warning: a plan made of its values says it of itself."""
        long = "" if self.spec.grid.betas else long_averages(self.tuned.betas, self.spec.training.steps)
        return (
            [f"betas were not looked for, and the runs are short for them, {long}: try [sweep] betas"] if long else []
        )

    def to_dict(self, data_hash: str) -> dict[str, Any]:
        """What ``result.json`` of a sweep holds. ``data_hash``: of the corpus it trained on."""
        return {
            "tuned": self.tuned.to_dict(),
            "verdict": self.verdict,
            "warnings": self.warnings,
            "advice": self.advice,
            "edge": self.best.valley.edge if self.best.valley else None,
            "runs": self.runs,
            "diverged": self.diverged,
            "stopped": self.stopped,
            "identity": self.spec.identity(data_hash),
            "asked": self.spec.grid.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
        }


def counted(trials: Sequence[Trial]) -> list[Trial]:
    """The ended trials: all of them count, whether the file still asks for them or not, for each is a run of this base."""
    return [t for t in trials if t.result is not None]


def summarise(spec: SweepSpec, trials: Sequence[Trial]) -> SweepResult:
    """Fit a valley in each cell (weight decay, init std, perhaps betas and AdamW's lr); the deepest fitted minimum wins.

    The tuned lr is the fitted minimum, held inside the grid (an edge is reported by the valley's verdict).

    Args:
        spec: what was asked for. trials: all that the storage holds, ended or not.

    Raises:
        ValueError: no run has a loss.
    """
    ended = counted(trials)
    found = [t for t in ended if t.state == "COMPLETE"]
    groups: dict[CellValues, list[LossPoint]] = {}
    for trial in ended:
        cell = groups.setdefault(CellValues.of(trial.point), [])
        cell.append(LossPoint(math.log2(trial.point["lr"]), trial.loss, trial.seed))
    lowest = sorted(groups, key=lambda cell: (min(p.loss for p in groups[cell]), cell))
    lowest = lowest[: FITTED_OF_MANY if len(found) > MANY else FITTED]
    cells = tuple(_cell(cell, groups[cell], fit=cell in lowest) for cell in sorted(groups))
    fitted = [cell for cell in cells if cell.valley is not None]
    if not fitted:
        raise ValueError("every run of the sweep diverged: lower the learning rates under [sweep] lr")
    best = min(fitted, key=lambda cell: cell.depth)
    assert best.valley is not None
    low, high = min(p.log2_lr for p in best.points), max(p.log2_lr for p in best.points)
    lr = 2.0 ** min(max(best.valley.minimum, low), high)  # beyond the outermost runs the curve is a guess
    tuned = spec.defaults.replace(lr=lr, **best.values.tuned)
    diverged = sum(not math.isfinite(trial.loss) for trial in found)
    return SweepResult(spec, cells, best, tuned, len(found), diverged, len(ended) - len(found), tuple(trials))


def _cell(values: CellValues, points: list[LossPoint], *, fit: bool) -> Cell:
    ordered = tuple(sorted(points, key=lambda p: (p.log2_lr, p.seed)))
    finite = any(math.isfinite(p.loss) for p in ordered)
    return Cell(values, ordered, fit_valley(ordered) if fit and finite else None)


def tuned_words(result: SweepResult) -> str:
    """What a sweep found, in a line."""
    return f"tuned: lr {result.tuned.lr:.4g}, {result.best.values}"
