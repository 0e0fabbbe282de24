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

DION = {"spectral": "spectral_norm", "match-rms": "rms_norm"}  # conventions that dion's Muon has, and its names of them


def is_muon(plan: PlanData) -> bool:
    """Whether the plan's matrices are Muon's."""
    return plan.tuned.optimizer == "muon"


def moved(rows: Sequence[ExportRow]) -> list[ExportRow]:
    """The rows that Muon moves."""
    return [row for row in rows if row.matrices is not None]


def parts(row: ExportRow, plan: PlanData, scale: str) -> list[tuple[int, float, float]]:
    """(fan-out, lr, weight decay) of every matrix that is fused in a row's tensors, in another convention of the rate.

    Args:
        row: that Muon moves; one of AdamW's has one entry, of its own values. plan: whose convention the row's values are in. scale: the wanted one, of
            :data:`mue.shapes.update_scales.UPDATE_SCALES`.
    """
    if row.matrices is None:
        return [(0, row.lr, row.weight_decay)]
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


def one_rate(rows: Sequence[ExportRow], plan: PlanData, scales: Sequence[str], why: str) -> tuple[str, float, float]:
    """(convention, lr, weight decay) that rows share, for a stack that has one rate for all of them.

    Args:
        rows: with the plan's values; those of AdamW's are the same in any convention. scales: conventions that the stack has; the
            plan's own is tried first. why: the message's beginning, with the stack's name.

    Raises:
        ValueError: in no convention of the stack have all rows one rate and one weight decay; names two that differ.
    """
    scales = sorted(scales, key=lambda scale: scale != plan.tuned.update_scale)
    found = {scale: [(row.pattern, *one[1:]) for row in rows for one in parts(row, plan, scale)] for scale in scales}
    for scale, values in found.items():
        if all(_alike(value, values[0]) for value in values):
            return scale, values[0][1], values[0][2]
    first, *others = found[scales[0]]
    other = next(value for value in others if not _alike(value, first))
    raise ValueError(
        f"{why}, and the plan has lr {first[1]:g}, weight decay {first[2]:g} for {first[0]} and {other[1]:g}, {other[2]:g} for"
        f" {other[0]} (in the convention {scales[0]!r}, and not one value in {' or '.join(scales[1:])} either):"
        ' export("torch"), or a stack with a rate for each group'
    )


def _alike(a: tuple[str, float, float], b: tuple[str, float, float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-12) for x, y in zip(a[1:], b[1:], strict=True))


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
