"""How many times fewer active FLOPs a MoE needs than a dense model for the same loss, read off the stable phases of their runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mue.lab.study.measure import CellMeasures
from mue.lab.study.schedule import Rows
from mue.shapes.hparams import warmup_steps

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class SpeedUp:
    """One pair of targets of an axis under one approach.

    Attributes:
        moe, dense: their names; both are as wide, as deep and have the same active width.
        factors: of each seed that both have: active FLOPs of the dense model over those of the MoE at the dense model's loss at the end
            of its stable phase. At 1 or below the MoE is no gain.
    """

    axis: str
    approach: str
    moe: str
    dense: str
    factors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric, as of ratios."""
        return math.exp(sum(map(math.log, self.factors)) / len(self.factors))


def speed_ups(measured: Sequence[CellMeasures], rows: Rows) -> list[SpeedUp]:
    """Every MoE beside the dense targets of its axis that cost as much a token, by the same approach and in the same run.

    Args:
        measured: all cells. rows: of runs that ended, with their validation losses.
    """
    out = []
    for m in measured:
        moe = m.cell.target
        if not any(block.is_moe for block in moe.shape.blocks):
            continue
        for d in measured:
            dense = d.cell.target
            if (
                (dense.axis, d.cell.approach.name, dense.training) == (moe.axis, m.cell.approach.name, moe.training)
                and not any(block.is_moe for block in dense.shape.blocks)
                and (dense.shape.width, dense.shape.layers, dense.shape.active_width)
                == (moe.shape.width, moe.shape.layers, moe.shape.active_width)
            ):
                found = [f for seed in m.transferred if (f := _factor(m, d, seed, rows)) is not None]
                if found:
                    out.append(SpeedUp(moe.axis, m.cell.approach.name, moe.name, dense.name, tuple(found)))
    return out


def _factor(moe: CellMeasures, dense: CellMeasures, seed: int, rows: Rows) -> float | None:
    """Of one seed; None where one of the two has no run, or their curves do not meet."""
    curves = []
    for one in (moe, dense):
        key = one.keys_at_1.get(seed)
        row = rows.get(key) if key else None
        if row is None:
            return None
        flops = one.cell.target.shape.flops_per_token * one.cell.target.training.batch
        curves.append([(step * flops, loss) for step, loss in _stable(one, row["curve"])])
    theirs, ours = curves[1], curves[0]
    if len(ours) < 2 or not theirs:
        return None
    spent, loss = theirs[-1]
    reached = _reaches(ours, loss)
    return None if reached is None else spent / reached


def _stable(one: CellMeasures, curve: Curve) -> Curve:
    """Validation losses after warmup and before the decay: there the loss depends on the steps alone (WSD, 2404.06395)."""
    steps, warmup = one.cell.target.training.steps, one.cell.approach.tuned.warmup
    return [(s, y) for s, y in curve if warmup_steps(warmup, steps) < s <= 0.8 * steps]


def _reaches(curve: Curve, loss: float) -> float | None:
    """Where a falling curve reaches a loss, straight in log FLOPs between and a little beyond its points."""
    x, y = np.log([s for s, _ in curve]), np.array([y for _, y in curve])
    for i in range(len(y) - 1):
        # between two points, or along the last stretch where the MoE has not come so low
        if y[i + 1] <= loss <= y[i] or (i == len(y) - 2 and loss < y[i + 1] < y[i]):
            at = x[i] + (y[i] - loss) / (y[i] - y[i + 1]) * (x[i + 1] - x[i])
            return float(np.exp(at)) if at <= x[-1] + math.log(1.5) else None
    return None
