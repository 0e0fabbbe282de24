"""Does Muon move what it is planned for, and only that, matrix by matrix, and does its iteration come to an end?"""

from __future__ import annotations

from collections.abc import Iterator

from mue.checks.context import Context
from mue.checks.matrix_step import (
    NOTHING,
    PLAIN,
    SMALL,
    alike,
    along,
    iterations,
    orthogonal,
    signs,
    smallest,
    taken_as,
)
from mue.checks.probe import Probe, probed
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several

NAME = "orthogonalisation"
WHOSE = "give it to the planned one: group['algorithm'] of plan.param_groups(model) says which is whose"
OWN = "mue.model.muon.Muon.of(plan, model), which moves matrix by matrix"
SIGN = 0.98  # cosine with AdamW's first step, which is a sign; of an orthogonal step it is about 0.8
FEW = 8  # elements that say nothing


@check_of(NAME, place=12, needs=("roles", "plan", "values", "batch"))
@probed(NAME)
def orthogonalisation(ctx: Context, found: list[Probe]) -> Iterator[Finding]:
    """Hidden matrices step in all directions alike, each for itself; whatever is planned for AdamW does not."""
    moved = [one for one in found if not one.copied and one.moved > 1e-3 * one.rms * one.info.parameter.numel() ** 0.5]
    faults: dict[str, list[tuple[str, tuple[str, str, str, str]]]] = {}
    for one in moved:
        if said := (_muons if one.planned == "muon" else _adamws)(one):
            faults.setdefault(said[2], []).append((one.info.name, said))
    for cause, many in faults.items():
        expected, measured, _, mend = many[0][1]
        yield Finding(NAME, FAIL, several([name for name, _ in many]), expected, measured, (cause,), mend)
    if faults:
        return
    matrices = sum(one.planned == "muon" for one in moved)
    if not matrices and (not moved or ctx.plan.tuned.optimizer == "muon"):
        yield Finding(NAME, SKIP, measured=NOTHING)
    else:
        text = f"{matrices} tensors by Muon, matrix by matrix" if matrices else "nothing moves as Muon moves matrices"
        yield Finding(NAME, PASS, measured=text)


def _muons(one: Probe) -> tuple[str, str, str, str] | None:
    """(expected, measured, cause, mend) of a tensor that Muon should move; None where it does."""
    assert one.design is not None and one.core is not None
    planned = "Muon: every direction of every matrix moves alike"
    if one.adamw > SIGN:
        cause = "it is in the groups of the AdamW beside Muon (a filter by name or by number of axes)"
        return planned, "AdamW's first step", cause, WHOSE
    if how := taken_as(one):
        cause = "a tensor was flattened, or handed to Muon as it lies: the polar factor of several is not that of each"
        return "one orthogonal step for each matrix in the tensor", how, cause, f"optimizer = {OWN}"
    right = alike(one.core, signs(one.design))
    small = smallest(one)
    plain = small < PLAIN and along(one) > 0.97
    if right < 0.8 and not plain:
        cause = "another algorithm, or axes that are not the layout's"
        return planned, f"another step (cosine {right:.2f})", cause, f"optimizer = {OWN}"
    if small < SMALL or plain:
        steps = iterations(one)
        seen = f"directions of 0.004 of the largest gradient get {small:.2g} of the largest step"
        done = "no orthogonalisation at all" if steps == 0 else f"about {steps} of Keller's five steps"
        cause = f"{done}: weak directions hardly learn"
        return planned, seen, cause, "five steps of Newton and Schulz (ns_steps=5)"
    return None


def _adamws(one: Probe) -> tuple[str, str, str, str] | None:
    """The same of a tensor that AdamW should move."""
    if one.adamw > SIGN:
        return None
    role = one.info.role.replace("_", " ")
    if one.design is None:
        if one.info.parameter.numel() < FEW or one.vector < 0.995:
            return None
        seen, cause = "a step along its gradient", f"Muon on a vector ({role}), or SGD"
        return "AdamW's first step", seen, cause, WHOSE
    if one.design.directions > 1 and orthogonal(one):
        cause = f"Muon got all that has two axes, and this is the {role}"
        return "AdamW's first step", "an orthogonal step: Muon's", cause, WHOSE
    return None
