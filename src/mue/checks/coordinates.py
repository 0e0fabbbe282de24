"""The coordinate check: the same model at several sizes along each axis, and the slope of every module's update.

It sees multipliers, init and learning rates. It does not see weight decay: ten steps of decay change nothing measurable.
That is what ``groups`` and ``moved`` of :func:`mue.check` are for, which read it back and measure the first step with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mue.checks.context import Loss
from mue.checks.measure import MakeOptimizer, ModuleValues, measure, planned
from mue.checks.picture import coordinates_picture
from mue.checks.report import FAIL as FAILED
from mue.checks.report import CheckError, Finding, Report
from mue.checks.slopes import FAIL, Slope, fitted
from mue.model.apply import init_
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.shapes import Transformer
from mue.util.errors import explain_calls, nearest
from mue.util.text import text_table

AXES: dict[str, Callable[[Transformer], float]] = {
    "width": lambda s: s.width,
    "depth": lambda s: s.layers,
    "experts": lambda s: s.blocks[0].experts,
    "active": lambda s: s.blocks[0].active,
    "granularity": lambda s: s.width / s.blocks[0].fan_in,
    "expansion": lambda s: s.blocks[0].active_width / s.width,
}
UP_GATE = "change of output by up and gate"


@dataclass(frozen=True)
class Coordinates:
    """The slopes of one coordinate check; prints as a table.

    Attributes:
        settings: what was run, for the record (steps, seeds, rule, sizes).
    """

    slopes: tuple[Slope, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Slope, ...]:
        return tuple(s for s in self.slopes if s.verdict == FAIL)

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **self.settings, "slopes": [s.to_dict() for s in self.slopes]}

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Write the picture: a panel per axis, a line per module. Needs matplotlib (the lab extra)."""
        coordinates_picture(self.slopes, path)

    def __str__(self) -> str:
        rows = [
            [
                s.axis,
                s.module,
                s.quantity,
                f"{s.slope:+.2f}",
                f"{s.low:+.2f} … {s.high:+.2f}",
                _range(s.expected),
                s.verdict,
            ]
            for s in self.slopes
        ]
        return text_table(["axis", "module", "quantity", "slope", "95 %", "expected", "verdict"], rows)


def _range(expected: tuple[float, float]) -> str:
    low, high = expected
    return f"{low:+.2f}" if low == high else f"{low:+.2f} … {high:+.2f}"


@explain_calls
def coordinate_check(
    build: Callable[[Transformer], nn.Module],
    plan: Callable[[Transformer], PlanData],
    axes: Mapping[str, Sequence[Transformer]],
    batches: Callable[[int], Any],
    *,
    steps: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: float = 0.2,
    optimizer: MakeOptimizer = planned,
    loss: Loss | None = None,
    raises: bool = True,
) -> Coordinates:
    """Train small models of several sizes for some steps, and judge how every module's update moves with size.

    Args:
        build: shape → module, with the plan's forward multipliers in it (or stock code and a folded plan); drawn here.
        plan: shape → its plan.
        axes: name from :data:`AXES` → shapes that differ along it, two or more; sizes are read off the shapes.
        batches: step → batch; step -1 is the held batch that everything is measured on.
        steps: 10 to 30, as the threads on mup's own check ask for (mup#71). seeds: of the init.
        tolerance: on slopes; a rule that is missing somewhere is off by half a power or more.
        optimizer: ``(plan, model) -> optimizer``; default AdamW of the plan's groups, or Muon.
        raises: raise where a slope fails; else return.

    Updates are expected flat, except what the rule itself predicts otherwise: the change that up and gate make grows as
    the plan's up/gate drift (√ρ_e; less half a power of the width while it is not aligned yet), experts with fewer tokens
    average less (the plan's σ0 drift), logits lie between head lr × multiplier ×
    width (learned) and head std × multiplier × √width (drawn): 1/ρ_d for complete-mue-paper. In
    depth flatness holds from about 8 layers on (docs/LOG.md).

    Raises:
        CheckError: a slope out of tolerance, named by axis and module.
        ValueError: an unknown axis, or one without at least two different sizes.

    Source: docs/why/index.md and docs/why/limits.md, what stays and what drifts.
    """
    slopes: list[Slope] = []
    done: dict[str, list[ModuleValues]] = {}
    for axis, shapes in axes.items():
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r}{nearest(axis, AXES)}")
        sizes = [AXES[axis](s) for s in shapes]
        if len(set(sizes)) < 2 or min(sizes) <= 0:
            raise ValueError(f"axis {axis!r} needs shapes of at least two sizes, got {sizes}")
        plans = [plan(s) for s in shapes]
        runs = []
        for shape, its in zip(shapes, plans, strict=True):
            # shapes that several axes share are trained once
            if its.hash not in done:
                done[its.hash] = [_run(build, shape, its, seed, batches, steps, optimizer, loss) for seed in seeds]
            runs.append(done[its.hash])
        slopes += _slopes(axis, sizes, plans, runs, tolerance)
    rule = plan(next(iter(axes.values()))[0]).rule.name
    made = Coordinates(tuple(slopes), {"rule": rule, "steps": steps, "seeds": list(seeds), "tolerance": tolerance})
    if raises and not made.ok:
        raise CheckError(Report(tuple(map(_finding, made.failures))))
    return made


def _run(
    build: Callable[[Transformer], nn.Module],
    shape: Transformer,
    plan: PlanData,
    seed: int,
    batches: Callable[[int], Any],
    steps: int,
    optimizer: MakeOptimizer,
    loss: Loss | None,
) -> ModuleValues:
    model = build(shape)
    init_(plan, model, seed)
    return measure(model, plan, batches, batches(-1), steps, optimizer, loss)


def _slopes(
    axis: str,
    sizes: Sequence[float],
    plans: Sequence[PlanData],
    runs: Sequence[Sequence[ModuleValues]],
    tolerance: float,
) -> list[Slope]:
    """The slope of every module that all sizes have, along one axis."""
    keys = [k for k in runs[0][0] if all(k in values for many in runs for values in many)]
    found = []
    for module, quantity in keys:
        if quantity == "size" and module != "feed-forward branch":
            continue  # at init logits may shrink with width, and attention averages over positions
        points = tuple((x, v[module, quantity]) for x, many in zip(sizes, runs, strict=True) for v in many)
        expected = _expected(module, quantity, sizes, plans)
        found.append(Slope(axis, module, quantity, *fitted(points), expected, tolerance, points))
    return found


def _expected(module: str, quantity: str, sizes: Sequence[float], plans: Sequence[PlanData]) -> tuple[float, float]:
    """The range of slopes that the rule itself predicts; (0, 0) where it promises that nothing changes."""
    known = (_drift, _active_width, _expert_noise)
    drift, wide, noise = (fitted([(x, f(p)) for x, p in zip(sizes, plans, strict=True)])[0] for f in known)
    if quantity.startswith("change of output"):
        # Where the change and what it meets are aligned, the rule's exponent; where they are not, a random sum instead of a
        # coherent one: half a power of the summed width less. A few steps lie between the two.
        full = drift if quantity == UP_GATE else 0.0
        return full - 0.5 * max(wide, 0.0) + min(noise, 0.0), full + max(noise, 0.0)
    if module == "logits":
        both = (fitted([(x, f(p)) for x, p in zip(sizes, plans, strict=True)])[0] for f in (_logit_step, _logit_start))
        # + 0.0 makes of -0.0 a zero, which would print as another number
        rounded = [round(slope, 3) + 0.0 for slope in both]
        return min(rounded), max(rounded)
    if module == "feed-forward branch" and quantity == "update":
        return min(0.0, drift) + min(noise, 0.0), max(0.0, drift) + max(noise, 0.0)
    return 0.0, 0.0


def _drift(plan: PlanData) -> float:
    value = plan.drift.get("up_gate")
    return value if value is not None and math.isfinite(value) else 1.0


def _active_width(plan: PlanData) -> float:
    return float(plan.active_width or 1)


def _expert_noise(plan: PlanData) -> float:
    """σ0 of the experts against the base: with fewer tokens each, their updates average less (reported drift)."""
    value = plan.drift.get("sigma0_experts")
    return value if value is not None and math.isfinite(value) else 1.0


def _logit_step(plan: PlanData) -> float:
    """lr · multiplier · fan-in: what one Adam step on the head changes a logit by, per unit of the hidden state."""
    unfolded = unfold(plan)
    role = "embedding" if plan.target.tied else "head"
    lr = unfolded.role(role).values.lr
    assert lr is not None
    return lr * unfolded.head_multiplier * plan.target.width


def _logit_start(plan: PlanData) -> float:
    """std · multiplier · √fan-in: what the head as it was drawn makes of a change of the hidden state."""
    unfolded = unfold(plan)
    std = unfolded.role("embedding" if plan.target.tied else "head").values.init_std
    return (std or 1.0) * unfolded.head_multiplier * math.sqrt(plan.target.width)


def _finding(s: Slope) -> Finding:
    kind = "too fast" if s.slope > s.expected[1] else "too slowly"
    return Finding(
        "coordinates",
        FAILED,
        f"{s.module} ({s.quantity}) along {s.axis}",
        f"slope {_range(s.expected)} ± {s.tolerance:g}",
        f"slope {s.slope:+.2f} ({s.low:+.2f} … {s.high:+.2f}): grows {kind}",
        (f"a factor of {s.axis} is missing or doubled in lr, init or a multiplier of what feeds {s.module}",),
        "run mue.check on the largest of these models: it names the tensor",
    )
