"""What stacks can say of the matrices that Muon moves: in which convention of the rate, one rate or several, how they lie in a tensor.

A stack that would take another step than the plan's is refused, with the tensor's name and the reason; nothing is rounded to what it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mue.export.rows import ExportRow
from mue.plan.plan import PlanData
from mue.shapes.update_scales import converted

BOTH = ("adamw", "muon")  # for the argument ``optimizers`` of rows()


def is_muon(plan: PlanData) -> bool:
    """Whether the plan's matrices are Muon's."""
    return plan.tuned.optimizer == "muon"


def moved(rows: Sequence[ExportRow]) -> list[ExportRow]:
    """The rows that Muon moves."""
    return [row for row in rows if row.matrices is not None]


def parts(row: ExportRow, plan: PlanData, scale: str) -> list[tuple[int, float, float]]:
    """(fan-out, lr, weight decay) of every matrix that is fused in a row's tensors, in another convention of the rate.

    Args:
        row: that Muon moves. plan: whose convention the row's values are in. scale: the wanted one, of
            :data:`mue.shapes.update_scales.UPDATE_SCALES`.
    """
    assert row.matrices is not None
    before = plan.tuned.update_scale
    if before == scale:  # exactly, and not by two roundings
        return [(out, row.lr, row.weight_decay) for out in row.matrices[2]]
    return [(out, *converted(row.lr, row.weight_decay, before, scale, out, row.fan_in)) for out in row.matrices[2]]


def restated(rows: Sequence[ExportRow], plan: PlanData, scale: str) -> list[ExportRow]:
    """The rows with the rates of Muon's in another convention; those of AdamW as they are.

    Raises:
        ValueError: a tensor of several matrices that have one rate in the plan's convention and several in this one.
    """
    return [row if row.matrices is None else _restated(row, plan, scale) for row in rows]


def _restated(row: ExportRow, plan: PlanData, scale: str) -> ExportRow:
    (_, lr, wd), *others = parts(row, plan, scale)
    if any(not math.isclose(other[1], lr, rel_tol=1e-12) for other in others):
        rates = ", ".join(f"{one[1]:g} for {one[0]} rows" for one in parts(row, plan, scale))
        raise ValueError(
            f"{row.pattern} holds {row.roles} in one tensor, with one rate in the plan's convention {plan.tuned.update_scale!r} and"
            f" several in {scale!r}, which this stack has ({rates}): tune in {scale!r}, or give each projection a tensor of its own"
        )
    return replace(row, lr=lr, weight_decay=wd)


def one_rate(rows: Sequence[ExportRow], plan: PlanData, scales: Sequence[str], stack: str) -> tuple[str, float, float]:
    """(convention, lr, weight decay) that all of Muon's matrices share, for a stack that has one rate for them.

    Args:
        scales: conventions that the stack has, tried in this order. stack: by name, for the message.

    Raises:
        ValueError: in no convention of the stack have all matrices one rate and one weight decay; names two that differ.
    """
    found = {
        scale: [(row.pattern, lr, wd) for row in moved(rows) for _, lr, wd in parts(row, plan, scale)]
        for scale in scales
    }
    for scale, values in found.items():
        _, lr, wd = values[0]
        if all(math.isclose(v[1], lr, rel_tol=1e-12) and math.isclose(v[2], wd, rel_tol=1e-12) for v in values):
            return scale, lr, wd
    scale = plan.tuned.update_scale if plan.tuned.update_scale in scales else scales[0]
    first = found[scale][0]
    other = next(
        v
        for v in found[scale]
        if not all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(v[1:], first[1:], strict=True))
    )
    raise ValueError(
        f"{stack} has one rate and one weight decay for all that Muon moves, and the plan has lr {first[1]:g}, weight decay"
        f" {first[2]:g} for {first[0]} and {other[1]:g}, {other[2]:g} for {other[0]} (in {scale!r}; in {' and '.join(scales)} alike):"
        ' export("torch"), or a stack with a rate for each group'
    )


def refuse_fused(rows: Sequence[ExportRow], stack: str, instead: str, but: Sequence[str] = ()) -> None:
    """``ValueError`` for a tensor of several projections, which a stack would orthogonalise as one matrix.

    Args:
        instead: what to do about it. but: patterns of tensors that the stack takes apart by itself.
    """
    for row in moved(rows):
        assert row.matrices is not None
        if len(row.matrices[2]) > 1 and row.pattern not in but:
            raise ValueError(
                f"{row.pattern} holds {row.roles} in one tensor, and {stack} would orthogonalise them as one matrix, which is"
                f" another step than theirs: {instead}"
            )


def refuse_stacked(rows: Sequence[ExportRow], stack: str, instead: str) -> None:
    """``ValueError`` for a tensor of several experts, which a stack would orthogonalise as one matrix, or not at all."""
    for row in moved(rows):
        assert row.matrices is not None
        if any("expert" in axis for axis in row.matrices[0]):
            raise ValueError(
                f"{row.pattern} holds all experts in one tensor of axes ({', '.join(row.matrices[0])}), and {stack}: {instead}"
            )


def moving(plan: PlanData) -> str:
    """The line on what the plan leaves to the stack, of an iteration of its own."""
    return (
        f"Muon's iteration: any that makes the singular values about 1 (five steps here). The rates are those of {plan.tuned.update_scale!r}"
        " in the plan, and of the convention named below in this file"
    )
