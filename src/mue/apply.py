"""A Plan on a torch model: init, optimizer groups, and a refusal where the model is not the one that was planned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mue.plan import Multipliers, Plan
from mue.planned import Values
from mue.roles import Placed, expert_slices, place, unwrap
from mue.rules.optimizers import MATRICES
from mue.rules.table import SHARED_INIT, VECTORS
from mue.shapes import Block

ADAFACTOR_FLOOR = 1e-3  # eps2 of torch.optim.Adafactor


@torch.no_grad()
def init_(plan: Plan, model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter with its planned std, in place.

    Draws are fp32 on the CPU from a generator seeded by (seed, canonical name, expert index), so that sharding,
    device and order of parameters change nothing, and two plans with one seed share their noise. Experts of a role
    planned as ``"shared"`` all start from one draw.

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.
    """
    for p in matched(plan, model):
        planned = plan.role(p.role, p.layer)
        if p.role in VECTORS:
            assert planned.constant is not None
            p.parameter.fill_(planned.constant)
            continue
        std = planned.values.init_std
        assert std is not None
        shared = planned.init == SHARED_INIT
        name = _name_of_all(p) if shared else p.name
        for expert, part in expert_slices(p):
            noise = torch.randn(part.shape, generator=_generator(seed, name, None if shared else expert))
            part.copy_(noise.to(torch.promote_types(part.dtype, noise.dtype)).mul_(std))


def _name_of_all(p: Placed) -> str:
    """One name for the same tensor of every expert of a layer, where experts are modules of their own."""
    parts, layer = [], str(p.layer)
    for i, part in enumerate(re.split(r"(\*)", p.layout.pattern)):
        parts.append(layer if part == "*" and i == 1 else part)
    return "".join(parts)


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def param_groups(plan: Plan, model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups, one per distinct setting, so fused updates stay fused.

    Each group has ``params, lr, weight_decay, eps, betas``, its ``roles``, and ``initial_lr`` for schedulers, and for other
    optimizers than AdamW what torch's own call theirs: ``momentum`` (SGD, Muon), the pair of ``eps`` (Adafactor),
    ``algorithm`` (``"muon"`` or ``"adamw"``: give each kind to its optimizer).

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p, values, floor in _settings(plan, matched(plan, model)):
        assert values.lr is not None and values.weight_decay is not None and values.eps is not None
        group: dict[str, Any] = {
            "params": [],
            "lr": values.lr,
            "initial_lr": values.lr,
            "weight_decay": values.weight_decay,
            "eps": values.eps,
            "betas": plan.betas,
            **_own_words(plan, p.role, values.eps, floor),
        }
        key = tuple(v for k, v in group.items() if k != "params")
        group = groups.setdefault(key, {**group, "roles": []})
        group["params"].append(p.parameter)
        if p.role not in group["roles"]:
            group["roles"].append(p.role)
    return list(groups.values())


def _settings(plan: Plan, placed: list[Placed]) -> Iterator[tuple[Placed, Values, float]]:
    """Every parameter with its values and its size at the start against the base's; a folded bias follows its weight."""
    from mue.fold.model import placed_coefficients
    from mue.fold.plan import folded_values

    for p, c in placed_coefficients(plan, placed):
        planned = plan.role(p.role, p.layer)
        if p.role == "bias":
            yield p, folded_values(plan, p.role, planned.values, c), c
        elif p.role in VECTORS:
            yield p, planned.values, planned.constant or 1.0
        else:
            yield p, planned.values, planned.factor.init_std or 1.0


def _own_words(plan: Plan, role: str, eps: float, scale: float) -> dict[str, Any]:
    """A group's settings under the names torch's optimizers give them."""
    optimizer = plan.tuned.optimizer
    if optimizer == "sgd":
        return {"momentum": plan.betas[0]}
    if optimizer == "adafactor":
        return {"eps": (eps, ADAFACTOR_FLOOR * scale)}  # eps2 floors rms(W), so it has the weight's scale
    if optimizer == "muon" and role.partition("_")[0] in MATRICES:
        return {"algorithm": "muon", "momentum": plan.betas[0], "adjust_lr_fn": "spectral_unclamped"}
    return {"algorithm": "adamw"} if optimizer == "muon" else {}


def matched(plan: Plan, model: nn.Module) -> list[Placed]:
    """The model's parameters with their roles, after checking that it is the model that was planned.

    Fan-in and number of experts of every tensor must be the target's, every role the plan counts must be there, and
    the model's own forward multipliers, where it has any, must be the plan's.
    """
    placed = place(model)
    layers = [block for block in plan.target.blocks for _ in range(block.layers)]
    faults = [fault for p in placed if (fault := _misfit(plan, layers, p))]
    here = {p.role for p in placed}
    tied = plan.target.tied
    for role, planned in plan.roles.items():
        if planned.count and role not in here and role != "router_bias":
            faults.append(f"the plan has {planned.count} tensors of role {role}, the model none")
    if tied != ("head" not in here):
        faults.append(
            f"the plan's target has tied = {str(tied).lower()}, the model's head is {'its embedding' if 'head' not in here else 'a tensor of its own'}"
        )
    faults += _multiplier_faults(plan, model)
    if faults:
        raise ValueError(
            f"this model is not the planned {plan.target.name} (plan {plan.hash}):\n  " + "\n  ".join(faults)
        )
    return placed


def _misfit(plan: Plan, layers: list[Block], p: Placed) -> str | None:
    if p.layer is not None and p.layer >= len(layers):
        return f"{p.name} is in layer {p.layer}, the plan has {len(layers)} layers"
    if not plan.role(p.role, p.layer).count and p.role != "bias":
        return f"{p.name} has role {p.role}, which the plan does not have{'' if p.layer is None else f' in layer {p.layer}'}"
    expected = _expected(plan, layers[p.layer] if p.layer is not None else None, p)
    for what, found, wanted in expected:
        if found != wanted:
            return f"{p.name} {tuple(p.parameter.shape)}: {what} {found}, planned {wanted}"
    return None


def _expected(plan: Plan, block: Block | None, p: Placed) -> list[tuple[str, int, int]]:
    """(what, found, planned) of one tensor's sizes."""
    t = plan.target
    if p.role in VECTORS:
        return []
    kind, _, part = p.role.partition("_")
    if kind == "embedding" or kind == "head":
        return [
            ("vocabulary", p.fan_out if kind == "head" else p.fan_in, t.vocab),
            ("width", p.fan_in if kind == "head" else p.fan_out, t.width),
        ]
    if kind == "attention":
        return [("fan-in", p.fan_in, t.attention_width if part == "o" else t.width)]
    assert block is not None
    if kind == "router":
        return [("fan-in", p.fan_in, t.width), ("experts", p.fan_out, block.experts)]
    hidden = {"ffn": block.ffn, "expert": block.expert, "shared": block.shared_width}[kind]
    found = p.fan_in if part == "down" else p.fan_out
    sizes = [
        ("hidden width", found, hidden or 0),
        ("residual width", p.fan_out if part == "down" else p.fan_in, t.width),
    ]
    return [*sizes, ("experts", p.experts, block.experts)] if kind == "expert" else sizes


def _multiplier_faults(plan: Plan, model: nn.Module) -> list[str]:
    """Where a model carries its own forward multipliers (ours do), they must be the plan's."""
    own = getattr(unwrap(model), "multipliers", None)
    if not isinstance(own, Multipliers):
        return []
    planned = plan.multipliers
    ones = (1.0,) * plan.target.layers
    own = replace(
        own,
        attention_scale=own.attention_scale or plan.target.head_dim**-0.5,
        output=own.output or ones,
        route=own.route or ones,
    )
    return [
        f"the model's {name} multiplier is {getattr(own, name)}, planned {getattr(planned, name)}: build it with plan.multipliers"
        for name in ("residual", "head", "attention_scale", "output", "route")
        if getattr(own, name) != getattr(planned, name)
    ]
