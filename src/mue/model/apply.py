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

ADAFACTOR_FLOOR = 1e-3  # eps2 of torch.optim.Adafactor, its default


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
            # scaled in fp32 (or better) and rounded once: a bf16 model starts at the rounded weights of the fp32 one
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
        # the first * of a pattern is the layer, a second one the expert, which stays a * (mue.layouts.layout.Layout)
        parts.append(layer if part == "*" and i == 1 else part)
    return "".join(parts)


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    # by name, not by order or shard (conventions 10); 63 of its bits, which are a positive int64
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def param_groups(plan: PlanData, model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups, one per distinct setting, so fused updates stay fused.

    Each group has ``params, lr, weight_decay, eps, betas`` and its ``roles``, and for other optimizers than AdamW what torch's
    own call theirs: ``momentum`` (SGD, Muon), the pair of ``eps`` (Adafactor), ``algorithm`` (``"muon"`` or ``"adamw"``: give
    each kind to its optimizer). ``initial_lr`` is not in them: schedulers put it there from the ``lr`` that they find, which is
    then also the one that was changed by hand.

    Args:
        plan: folded or not, as the model's forward pass is. model: the planned one, on its final device.

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.
    """
    return [{**g, "params": [p.parameter for p in g["params"]]} for g in grouped(plan, tensor_plans(plan, model))]


def grouped(plan: PlanData, tensors: Iterable[TensorPlan]) -> list[dict[str, Any]]:
    """:func:`param_groups` with each parameter and its role (a ``ParamInfo``) under ``params``.

    Args:
        plan: which form of it the tensors' values have. tensors: :func:`mue.model.tensor_plan.tensor_plans`.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p, values, _, scale in tensors:
        if not ROLES[p.role].trained:
            continue  # moved by load statistics, never by the optimizer
        assert values.lr is not None and values.weight_decay is not None and values.eps is not None
        group: dict[str, Any] = {
            "params": [],
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "eps": values.eps,
            "betas": plan.betas,
            **_torch_names(plan, p.role, values.eps, scale),
        }
        # few groups: one per tensor would end the fused and foreach updates (anchors 1.2, unit-scaling)
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
        # β1 is what averages gradients in SGD as well
        return {"momentum": plan.betas[0]}
    if optimizer == "adafactor":
        return {"eps": (eps, ADAFACTOR_FLOOR * scale)}  # eps2 floors rms(W), so it has the weight's scale
    if optimizer == "muon" and ROLES[role].hidden:
        # √(out/in) without a floor at 1: the update's operator norm is lr at every shape (transfer-rules 7)
        return {"algorithm": "muon", "momentum": plan.betas[0], "adjust_lr_fn": "spectral_unclamped"}
    return {"algorithm": "adamw"} if optimizer == "muon" else {}
