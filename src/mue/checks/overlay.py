"""The initial-loss overlay, the authors' own test: the first steps of dense and MoE variants lie over each other.

It sees wrong learning rates. It hardly sees a wrong output multiplier, because Adam repairs that within the first steps
(docs/LOG.md): for the wiring use :func:`mue.check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mue.checks.context import Loss, loss_of
from mue.checks.measure import MakeOptimizer, planned
from mue.checks.report import FAIL, CheckError, Finding, Report
from mue.model.apply import init_
from mue.plan.plan import PlanData
from mue.shapes import Transformer
from mue.util.statistics import student_quantile
from mue.util.text import text_table

BLOCK = 10  # steps averaged into one point: neighbouring steps are not independent


@dataclass(frozen=True)
class Gap:
    """One variant's loss minus the reference's, on the same batches, in nats.

    Attributes:
        early, late: means over the second and third, and the last two fifths of the steps. widening: nats per 100 steps by
            which the gap's size grows over the second half, with its 95 % interval.
    """

    name: str
    early: float
    late: float
    widening: float
    low: float
    high: float
    limit: float
    growth: float

    @property
    def ok(self) -> bool:
        """The gap is small, early within twice the limit, and does not grow for certain."""
        small = abs(self.early) <= 2 * self.limit and abs(self.late) <= self.limit
        return math.isfinite(self.late) and small and not self.low > self.growth


@dataclass(frozen=True)
class Overlay:
    """All variants against the reference; prints as a table."""

    reference: str
    gaps: tuple[Gap, ...]

    @property
    def ok(self) -> bool:
        return all(g.ok for g in self.gaps)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "reference": self.reference, "gaps": [{**vars(g), "ok": g.ok} for g in self.gaps]}

    def __str__(self) -> str:
        rows = [
            [
                g.name,
                f"{g.early:+.3f}",
                f"{g.late:+.3f}",
                f"{g.widening:+.3f} ({g.low:+.3f} … {g.high:+.3f})",
                "pass" if g.ok else "fail",
            ]
            for g in self.gaps
        ]
        return text_table(["variant", "early gap", "late gap", "widening per 100 steps", "verdict"], rows)


def overlay(
    losses: Mapping[str, Sequence[float]],
    reference: str,
    *,
    limit: float = 0.12,
    growth: float = 0.05,
    raises: bool = True,
) -> Overlay:
    """Judge recorded losses: a late gap above ``limit`` nats (early: twice that), or one that surely grows by more than ``growth`` per 100 steps, fails.

    Args:
        losses: name → training losses of the first steps, all on the same batches (50 steps or more).
        reference: the name of the dense base among them.

    Raises:
        CheckError: a variant leaves the reference. ValueError: too few steps, or no such reference.

    Source: the authors' own test of Complete-muE (2605.23893).
    """
    if reference not in losses:
        raise ValueError(f"no losses of {reference!r}: they are of {', '.join(losses)}")
    steps = min(map(len, losses.values()))
    if steps < 5 * BLOCK:
        raise ValueError(f"{steps} steps are too few for an overlay: give at least {5 * BLOCK}")
    gaps = tuple(
        _gap(name, [a - b for a, b in zip(curve[:steps], losses[reference][:steps], strict=True)], limit, growth)
        for name, curve in losses.items()
        if name != reference
    )
    made = Overlay(reference, gaps)
    if raises and not made.ok:
        raise CheckError(Report(tuple(_finding(g, reference) for g in gaps if not g.ok)))
    return made


def first_losses(
    build: Callable[[Transformer], nn.Module],
    plan: PlanData,
    batches: Callable[[int], Any],
    *,
    steps: int = 100,
    seed: int = 0,
    optimizer: MakeOptimizer = planned,
    loss: Loss | None = None,
) -> list[float]:
    """Training losses of the first steps of the plan's target, drawn and grouped as planned, at constant peak lr."""
    model = build(plan.target)
    init_(plan, model, seed)
    stepper = optimizer(plan, model)
    found = []
    for step in range(steps):
        stepper.zero_grad(set_to_none=True)
        # the same batch for every variant at this step: a gap is then the model's
        value = loss_of(model, batches(step), loss)
        value.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        found.append(float(value.detach()))
    return found


def _gap(name: str, gap: Sequence[float], limit: float, growth: float) -> Gap:
    n = len(gap)
    early, late = gap[n // 5 : 3 * n // 5], gap[3 * n // 5 :]
    half = gap[n // 2 :]
    # a gap may be on either side: what must not grow is its size
    sign = math.copysign(1.0, math.fsum(half))
    blocks = [sign * math.fsum(half[i : i + BLOCK]) / BLOCK for i in range(0, len(half) - BLOCK + 1, BLOCK)]
    slope, spread = _line(blocks)
    per = 100 / BLOCK
    return Gap(
        name, _mean(early), _mean(late), slope * per, (slope - spread) * per, (slope + spread) * per, limit, growth
    )


def _line(y: Sequence[float]) -> tuple[float, float]:
    """(slope per block, half width of its 95 % interval)."""
    n = len(y)
    x = [i - (n - 1) / 2 for i in range(n)]
    square = math.fsum(a * a for a in x)
    slope = math.fsum(a * b for a, b in zip(x, y, strict=True)) / square
    if n < 3:
        return slope, math.inf
    left = math.fsum((b - _mean(y) - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, student_quantile(0.975, n - 2) * math.sqrt(left / (n - 2) / square)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finding(g: Gap, reference: str) -> Finding:
    return Finding(
        "overlay",
        FAIL,
        g.name,
        f"within {g.limit:g} nats of {reference}, and not widening",
        f"early gap {g.early:+.3f}, late {g.late:+.3f}, widening {g.widening:+.3f} per 100 steps",
        (
            "a learning rate scaled twice or not at all",
            "another order of batches than the reference's",
            "the router has collapsed: look at the load",
        ),
        "mue.check(model, plan, batch, optimizer) names the group",
    )
