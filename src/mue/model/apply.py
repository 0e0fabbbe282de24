"""What a plan does to a torch model: the draw of every parameter, and the optimizer's groups."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import ParamInfo, expert_slices
from mue.model.tensor_plan import TensorPlan, tensor_plans
from mue.plan.plan import PlanData
from mue.rules.roles import ROLES
from mue.rules.table import SHARED_INIT

ADAFACTOR_FLOOR = 1e-3  # eps2 of torch.optim.Adafactor


@torch.no_grad()
def init_(plan: PlanData, model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter with its planned std, in place; gains and biases start at their constant.

    Draws are fp32 on the CPU from a generator seeded by (seed, canonical name, expert index), so that sharding,
    device and order of parameters change nothing, and two plans with one seed share their noise. Experts of a role
    planned as ``"shared"`` all start from one draw. What the layout marks ``"own"`` keeps the values it has (decay rates of
    a state space, short filters), so build the model with its own initialisation first.

    Args:
        plan: folded or not, as the model's forward pass is. seed: of every draw.

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.
    """
    for p, values, constant, _ in tensor_plans(plan, model):
        if not ROLES[p.role].drawn:
            if constant is not None:
                p.parameter.fill_(constant)
            continue
        std = values.init_std
        assert std is not None
        shared = plan.role(p.role, p.layer).init == SHARED_INIT
        name = _name_without_expert(p) if shared else p.name
        sharded = hasattr(p.parameter, "placements")  # a DTensor: every rank draws the whole and keeps its own shard
        whole = (
            replace(p, parameter=nn.Parameter(torch.empty(p.parameter.shape, dtype=p.parameter.dtype)))
            if sharded
            else p
        )
        for expert, part in expert_slices(whole):
            noise = torch.randn(part.shape, generator=_generator(seed, name, None if shared else expert))
            part.copy_(noise.to(torch.promote_types(part.dtype, noise.dtype)).mul_(std))
        if sharded:
            from torch.distributed.tensor import distribute_tensor

            values_here = whole.parameter.to(p.parameter.device)
            mesh, placements = p.parameter.device_mesh, p.parameter.placements  # type: ignore[attr-defined]
            p.parameter.copy_(distribute_tensor(values_here, mesh, placements))


def _name_without_expert(p: ParamInfo) -> str:
    """One name for the same tensor of every expert of a layer, where experts are modules of their own."""
    parts, layer = [], str(p.layer)
    for i, part in enumerate(re.split(r"(\*)", p.layout.pattern)):
        parts.append(layer if part == "*" and i == 1 else part)
    return "".join(parts)


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def param_groups(plan: PlanData, model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups, one per distinct setting, so fused updates stay fused.

    Each group has ``params, lr, weight_decay, eps, betas``, its ``roles``, and ``initial_lr`` for schedulers, and for other
    optimizers than AdamW what torch's own call theirs: ``momentum`` (SGD, Muon), the pair of ``eps`` (Adafactor),
    ``algorithm`` (``"muon"`` or ``"adamw"``: give each kind to its optimizer).

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.
    """
    return [{**g, "params": [p.parameter for p in g["params"]]} for g in grouped(plan, tensor_plans(plan, model))]


def grouped(plan: PlanData, tensors: Iterable[TensorPlan]) -> list[dict[str, Any]]:
    """:func:`param_groups` with each parameter and its role (a ``ParamInfo``) under ``params``."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p, values, _, scale in tensors:
        if not ROLES[p.role].trained:
            continue  # moved by load statistics, never by the optimizer
        assert values.lr is not None and values.weight_decay is not None and values.eps is not None
        group: dict[str, Any] = {
            "params": [],
            "lr": values.lr,
            "initial_lr": values.lr,
            "weight_decay": values.weight_decay,
            "eps": values.eps,
            "betas": plan.betas,
            **_torch_names(plan, p.role, values.eps, scale),
        }
        key = tuple(v for k, v in group.items() if k != "params")
        group = groups.setdefault(key, {**group, "roles": []})
        group["params"].append(p)
        if p.role not in group["roles"]:
            group["roles"].append(p.role)
    return list(groups.values())


def _torch_names(plan: PlanData, role: str, eps: float, scale: float) -> dict[str, Any]:
    """What torch's other optimizers call a group's settings, and those that only they have."""
    optimizer = plan.tuned.optimizer
    if optimizer == "sgd":
        return {"momentum": plan.betas[0]}
    if optimizer == "adafactor":
        return {"eps": (eps, ADAFACTOR_FLOOR * scale)}  # eps2 floors rms(W), so it has the weight's scale
    if optimizer == "muon" and ROLES[role].hidden:
        return {"algorithm": "muon", "momentum": plan.betas[0], "adjust_lr_fn": "spectral_unclamped"}
    return {"algorithm": "adamw"} if optimizer == "muon" else {}
