"""Were the weights drawn as planned? Measured tensor by tensor, expert by expert, part by part of a fused tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, Finding, several
from mue.layouts.layout import ParamInfo, expert_slices
from mue.model.tensor_plan import TensorPlan
from mue.rules.roles import ROLES
from mue.rules.table import NORMAL

NAME = "init"
TOLERANCE = 0.02  # a normal cut at three sigma has 1.3 % less std, and is right
SIGMAS = 6.0  # standard errors: chance passes them twice in 10^9, and a MoE has thousands of matrices to look at


@check_of(NAME, place=3, needs=("roles", "plan", "values"))
def init(ctx: Context) -> Iterator[Finding]:
    """Every tensor's std against the plan, within 2 % or six standard errors of its size; constants exactly."""
    found: dict[tuple[str, str, str], list[str]] = {}
    counted = 0
    for s in ctx.tensor_plans:
        counted += 1
        for where, expected, measured in _wrong(ctx, s):
            found.setdefault((s.info.role, expected, measured), []).append(where)
    for (role, expected, measured), names in found.items():
        yield Finding(
            NAME,
            FAIL,
            several(names),
            expected,
            measured,
            _causes(role, names),
            "plan.init_(model)  # after the last .to() or load",
        )
    twins = list(_twins(ctx))
    yield from twins
    if not found and not twins:
        yield Finding(NAME, PASS, measured=f"{counted} tensors drawn as planned")


def _wrong(ctx: Context, s: TensorPlan) -> Iterator[tuple[str, str, str]]:
    """(where, expected, measured) of each piece of a tensor that was not drawn, or not set, as planned."""
    p = s.info
    if not ROLES[p.role].drawn:
        value = p.parameter.detach().double()
        # a constant is exact but for the rounding of its type
        tolerance = 1e-6 if p.parameter.dtype in (torch.float32, torch.float64) else 1e-2
        if s.constant is not None and float((value - s.constant).abs().max()) > tolerance * max(1.0, abs(s.constant)):
            yield (
                p.name,
                f"constant {s.constant:g}",
                f"mean {float(value.mean()):.4g}, from {float(value.min()):.4g} to {float(value.max()):.4g}",
            )
        return
    planned = s.values.init_std
    assert planned is not None
    for where, tensor in _pieces(p):
        std, mean, n = _moments(tensor)
        # the relative standard error of a std of n normal numbers is 1/√(2n), that of their mean 1/√n
        bound = max(TOLERANCE, SIGMAS / math.sqrt(2 * n))
        if not abs(std - planned) <= bound * planned + 1e-30:
            yield where, f"std {planned:.4g} ± {100 * bound:.2g} %", f"std {std:.3g} (× {_times(std, planned)})"
        # a thousandth of the std changes nothing, however surely it is measured on a large tensor
        elif abs(mean) > SIGMAS * planned / math.sqrt(n) + 1e-3 * planned:
            yield where, "mean 0", f"mean {mean:.3g}, {_times(abs(mean), planned)} of the std"


def _times(a: float, b: float) -> str:
    return f"{a / b:.3g}" if b else "∞"


def _moments(t: Tensor) -> tuple[float, float, int]:
    """Root mean square about the mean, mean, count; in float32 or better (torch sums in pairs: 1e-6 at any size)."""
    wide = t.detach() if t.dtype == torch.float64 else t.detach().float()
    mean = float(wide.mean())
    square = float(torch.linalg.vector_norm(wide)) ** 2 / wide.numel()
    return math.sqrt(max(square - mean * mean, 0.0)), mean, wide.numel()


def _pieces(p: ParamInfo) -> Iterator[tuple[str, Tensor]]:
    """Every expert's part of a tensor, and of a fused one every matrix, each with a name."""
    axes = [a.removeprefix("expert*") for a in p.layout.axes if not (a == "expert" and p.experts >= 1)]
    for expert, tensor in expert_slices(p):
        name = p.name if expert is None else f"{p.name}[expert {expert}]"
        split = len(p.layout.parts) if ROLES[p.role].feed_forward else 0
        if split < 2 or "out" not in axes:
            yield name, tensor
            continue
        for part, piece in zip(p.layout.parts, tensor.chunk(split, axes.index("out")), strict=True):
            yield f"{name} ({part})", piece


def _causes(role: str, names: list[str]) -> tuple[str, ...]:
    if any("[expert" in n for n in names):
        return (
            "these experts kept the start of the model's own code (init ran over one expert, or before they were built)",
            "the fan-in was taken from the wrong axis of the stacked tensor",
            "a name pattern missed them",
        )
    if ROLES[role].vector:
        return ("plan.init_ never ran, or ran before the model was folded", "the code adds 1 to the gain itself")
    return (
        "the model's own init ran after plan.init_",
        "drawn twice or scaled twice (tied weights, a depth-scaled init on top)",
        "planned for another model",
    )


def _twins(ctx: Context) -> Iterator[Finding]:
    """Tensors or experts that start from one and the same draw, where the plan draws each for itself."""
    seen: dict[tuple[float, ...], str] = {}
    same: list[tuple[str, str]] = []
    for s in ctx.tensor_plans:
        p = s.info
        if not ROLES[p.role].drawn or ctx.plan.role(p.role, p.layer).init != NORMAL:
            continue
        for expert, tensor in expert_slices(p):
            # Divided by the planned std, so that one draw at two scales is found; eight equal numbers are no chance.
            head = tensor.flatten()[:8].double() / (s.values.init_std or 1.0)
            key = tuple(round(x, 5) for x in head.tolist())
            name = p.name if expert is None else f"{p.name}[expert {expert}]"
            if len(key) >= 4 and any(key) and key in seen:
                same.append((name, seen[key]))
            seen.setdefault(key, name)
    if same:
        yield Finding(
            NAME,
            FAIL,
            several([a for a, _ in same]),
            "a draw of its own for every tensor and expert",
            f"the same numbers as {same[0][1]}",
            (
                "the generator was seeded anew for each of them",
                "one expert was copied into the others",
                "upcycled: use a rule that plans shared starts",
            ),
            "plan.init_(model)",
        )
