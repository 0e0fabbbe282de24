"""Sizes and updates of every module of one model over some training steps, without hooks.

What is compared is what the kernels were handed: a module that is used twice is seen twice, a functional call and a stacked
tensor of experts are seen at all. Values are root mean squares over a held batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.checks.branches import Branch, branches
from mue.checks.context import Loss, evaluating, forward, logits_of, loss_of
from mue.checks.record import Record
from mue.checks.solve import Coefficients, columns, solve_coefficients
from mue.checks.trace import traced
from mue.layouts.layout import ParamInfo, unwrap
from mue.layouts.of_model import placed
from mue.model.apply import param_groups
from mue.model.muon import Muon
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.rules.roles import ROLES

# Roles whose product has one row per token in the order of the batch, at any time of training: an expert's rows change with
# the routing, and what o and down are given is a product of products.
_ALIGNED = frozenset(r for r, role in ROLES.items() if role.reads_residual and role.inside and role.kind != "expert")
MakeOptimizer = Callable[[PlanData, nn.Module], Optimizer]
ModuleValues = dict[tuple[str, str], float]  # (module, quantity) → root mean square


def planned(plan: PlanData, model: nn.Module) -> Optimizer:
    """AdamW with the plan's own groups, or, of a plan for it, Muon."""
    if plan.tuned.optimizer == "muon":
        return Muon.of(plan, model)
    return torch.optim.AdamW(param_groups(plan, model))


def measure(
    model: nn.Module,
    plan: PlanData,
    batches: Callable[[int], Any],
    held: Any,
    steps: int,
    make_optimizer: MakeOptimizer = planned,
    loss: Loss | None = None,
) -> ModuleValues:
    """Train a model for some steps and measure it on a held batch before and after.

    Args:
        model: drawn already; it is left trained. plan: in the form in which it was applied.
        batches: step → batch. held: the batch that everything is measured on.
        steps: of training. make_optimizer: ``(plan, model) -> optimizer``.
        loss: see :func:`mue.checks.context.loss_of`.

    Returns:
        (module, quantity) → root mean square in units of the activation: ``size`` is taken before, ``update`` is the
        change, ``change of output by …`` what some of the new weights do at the first inputs and gates.
    """
    params, inner = placed(model), unwrap(model)
    unfolded = unfold(plan)
    optimizer = make_optimizer(plan, model)

    def look() -> tuple[Record, Any]:
        with evaluating(inner):
            return traced(params, plan.target.width, lambda: forward(inner, held))

    before = look()
    old = {p.name: p.parameter.detach().clone() for p in params}
    parts = _parts(before[0], params)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, batches(step), loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after = look()
    found = _compared(_activations(*before, unfolded), _activations(*after, unfolded))
    found.update(_by_weights(params, old, parts, unfolded.residual_multiplier))
    return found


def _activations(record: Record, out: Any, plan: PlanData) -> dict[str, list[Tensor]]:
    """Module → its values, one for each layer and use. Branches are freed of the planned residual multiplier."""
    found: dict[str, list[Tensor]] = {}
    for p in record.products:
        if p.info.role in _ALIGNED:
            found.setdefault(p.info.role.replace("_", " "), []).append(p.out)
    for b in branches(record):
        # l^-α is what makes a branch small in a deep model: without it taken out every depth would slope
        found.setdefault(f"{b.kind} branch", []).append(b.out / plan.residual_multiplier)
    if record.stream is not None:
        found["stream"] = [record.stream]
    logits = logits_of(out)
    if logits is not None:
        found["logits"] = [logits]
    return found


def _compared(before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]]) -> ModuleValues:
    found: ModuleValues = {}
    for module, many in before.items():
        pairs = [
            (a.float(), b.float()) for a, b in zip(many, after.get(module, ()), strict=False) if a.shape == b.shape
        ]
        if len(pairs) == len(many):
            found[module, "size"] = _rms([a for a, _ in pairs])
            found[module, "update"] = _rms([b - a for a, b in pairs])
    return found


def _rms(tensors: list[Tensor]) -> float:
    total = math.fsum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))


# ---- which weights changed the output of a feed-forward -------------------------------------------------------------------


def _parts(record: Record, placed: list[ParamInfo], tokens: int = 32) -> list[tuple[Branch, Coefficients]]:
    found: list[tuple[Branch, Coefficients]] = []
    for b in branches(record):
        if b.kind == "feed-forward":
            c = solve_coefficients(b, placed, tokens, found[-1][1] if found else None)
            if c is not None and c.fits and not c.watched:
                found.append((b, c))
    return found


@torch.no_grad()
def _by_weights(
    placed: list[ParamInfo], old: Mapping[str, Tensor], parts: list[tuple[Branch, Coefficients]], residual: float
) -> ModuleValues:
    """Change of the feed-forward's output, at the first inputs and gates, by its new down weights and by its new up and gate."""
    new = {p.name: p.parameter.detach().clone() for p in placed}
    made: dict[str, list[Tensor]] = {}
    try:
        for kind in ("old", "down", "up and gate"):
            for p in placed:
                down = ROLES[p.role].part == "down"
                fresh = kind != "old" and down == (kind == "down")
                p.parameter.copy_((new if fresh else old)[p.name])
            made[kind] = [_output(placed, b, c) / residual for b, c in parts]
    finally:
        for p in placed:
            p.parameter.copy_(new[p.name])
    if not parts:
        return {}
    return {
        ("feed-forward branch", f"change of output by {kind}"): _rms(
            [a - b for a, b in zip(made[kind], made["old"], strict=True)]
        )
        for kind in ("down", "up and gate")
    }


def _output(placed: list[ParamInfo], b: Branch, c: Coefficients) -> Tensor:
    # with the gates of the first look: their change is another quantity
    x = c.given.double()
    routed, single = columns(b.layer, placed, x, c.activation, c.shared)
    out = torch.zeros_like(x) if routed is None else torch.einsum("ntd,tn->td", routed, c.routed)
    return out if single is None or c.single is None else out + single * c.single[:, None]
