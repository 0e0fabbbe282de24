"""Is an orthogonal step multiplied by what the plan's lr is stated for, and does the lr still reach the weights?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

from mue.checks.context import Context
from mue.checks.matrix_step import NOTHING, orthogonal, size, taken_as
from mue.checks.probe import SCALES, Probe, probed, resized
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several
from mue.shapes.update_scales import UPDATE_SCALES

NAME = "update scale"
SPREAD = 0.08  # relative: one iteration in bfloat16 brings directions of one size to the same length up to this
LENGTHS = (0.6, 1.4)  # of an orthogonal step: Keller's iteration ends at 0.7 to 1.2, others nearer to 1
Scale = Callable[[int, int], float]
MEND = "give the optimizer plan.param_groups(model), adjust_lr_fn among them, or plan in its convention: mue.HParams(update_scale=...)"


@check_of(NAME, place=14, needs=("roles", "plan", "values", "batch"))
@probed(NAME)
def update_scale(ctx: Context, found: list[Probe]) -> Iterator[Finding]:
    """Length of each matrix's step over lr, against the planned convention; of all matrices with as many directions it is one."""
    seen = [one for one in found if _looked_at(one)]
    if not seen:
        yield Finding(NAME, SKIP, measured=NOTHING)
        return
    sizes = {one.info.name: size(one) for one in seen}
    if _misfit(seen, sizes) < math.inf:
        low, high = min(sizes.values()), max(sizes.values())
        yield Finding(NAME, PASS, measured=f"{ctx.plan.tuned.update_scale}; {low:.2f} to {high:.2f} × a polar factor")
        return
    yield _clipped(ctx, seen, sizes) or _other(ctx, seen, sizes)


def _looked_at(one: Probe) -> bool:
    if one.planned != "muon" or one.copied or one.core is None or one.moved == 0:
        return False
    return orthogonal(one) and not taken_as(one)


def _misfit(seen: list[Probe], sizes: dict[str, float], scale: Scale | None = None) -> float:
    """How far all steps are from one length near 1 by a convention, the planned one or another; infinite where they have none."""
    lengths: dict[int, list[float]] = {}
    for one in seen:
        assert one.design is not None
        length = sizes[one.info.name] / (1.0 if scale is None else _ratio(one, scale))
        lengths.setdefault(one.design.directions, []).append(length)
    alike = all(max(many) <= min(many) * (1 + SPREAD) for many in lengths.values())
    middles = [statistics.median(many) for many in lengths.values()]
    if not alike or min(middles) < LENGTHS[0] or max(middles) > LENGTHS[1]:
        return math.inf
    return max(abs(math.log(middle)) for middle in middles)


def _clipped(ctx: Context, seen: list[Probe], sizes: dict[str, float]) -> Finding | None:
    """A clip of the orthogonal update, or of the step: with fewer directions each of them becomes longer, or lr does nothing."""
    one = max((p for p in seen if p.design is not None), key=lambda p: p.design.directions if p.design else 0)
    alone, slow = resized(ctx, one.info.name)
    several_directions = one.design is not None and one.design.directions >= 4
    length = sizes[one.info.name]
    # of six directions that were as large one is left, so that the norm is 1/√6 of what it was; the iteration itself moves by 1.6
    if not (several_directions and alone > 1.8 * length) and slow < 1.5:
        return None
    measured = f"{length:.3g} × the planned step, and {alone:.3g} × where one direction of each matrix moves"
    if slow >= 1.5:
        measured = f"half the lr makes the same step ({length:.3g} × the planned one)"
    return Finding(
        NAME,
        FAIL,
        several([p.info.name for p in seen]),
        "a step as long as lr says, whatever its norm",
        measured,
        (
            "clipped after the orthogonalisation: the norm of such an update is its shape's, so the threshold replaces the rate",
        ),
        "clip the gradients before optimizer.step(), and not the updates in it",
    )


def _other(ctx: Context, seen: list[Probe], sizes: dict[str, float]) -> Finding:
    """The convention that was used, where one fits."""
    off, name = min((_misfit(seen, sizes, scale), name) for name, scale in _conventions())
    low, high = min(seen, key=lambda p: sizes[p.info.name]), max(seen, key=lambda p: sizes[p.info.name])
    text = f"{sizes[low.info.name]:.3g} × it ({low.info.name}) to {sizes[high.info.name]:.3g} × it ({high.info.name})"
    planned = UPDATE_SCALES[ctx.plan.tuned.update_scale]
    cause = (
        f"the optimizer multiplies by {name}"
        if off < math.inf
        else "another convention, or another rate in the step than its group says"
    )
    names = several([p.info.name for p in seen])
    return Finding(NAME, FAIL, names, f"lr · {planned.formula} · an orthogonal step", text, (cause,), MEND)


def _ratio(one: Probe, scale: Scale) -> float:
    """Another convention's factor against the planned one."""
    assert one.design is not None
    fan_in = one.design.right.shape[0]
    planned = SCALES[one.group["adjust_lr_fn"]]
    ratios = [scale(rows, fan_in) / planned(rows, fan_in) for rows in one.design.how[2]]
    return statistics.median(ratios)


def _conventions() -> list[tuple[str, Scale]]:
    known: list[tuple[str, Scale]] = [(one.formula, one.factor) for one in UPDATE_SCALES.values()]
    turned: list[tuple[str, Scale]] = [
        (f"{one.formula} with out and in exchanged", lambda out, fan_in, f=one.factor: f(fan_in, out))  # type: ignore[misc]
        for one in UPDATE_SCALES.values()
    ]
    return [
        *known,
        ("1, whatever the shape", lambda out, fan_in: 1.0),
        *turned,
        ("√max(out, in)", lambda o, i: math.sqrt(max(o, i))),
    ]
