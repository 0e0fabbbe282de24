"""What a plan does to a torch model: the draw of every parameter, and the optimizer's groups."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import UNPLANNED, ParamInfo, expert_slices
from mue.layouts.of_model import layout_of, placement_of
from mue.model.matrices import matrices_of
from mue.model.tensor_plan import TensorPlan, tensor_plans
from mue.plan.plan import PlanData
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.rules.table import SHARED_INIT
from mue.shapes.update_scales import UPDATE_SCALES

ADAFACTOR_FLOOR = 1e-3  # eps2 of torch.optim.Adafactor, its default

_DRAWN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned; one
            that no draw can be written into (on the meta device, made under inference mode, of 8-bit numbers).
    """
    plans = tensor_plans(plan, model)
    _can_be_drawn([s.info for s in plans])
    for p, values, constant, _ in plans:
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
            replace(p, parameter=nn.Parameter(torch.empty(p.parameter.shape, dtype=p.parameter.dtype, device="cpu")))
            if sharded
            else p
        )
        for expert, part in expert_slices(whole):
            # scaled in fp32 (or better) and rounded once: a bf16 model starts at the rounded weights of the fp32 one
            generator = _generator(seed, name, None if shared else expert)
            # whatever torch.set_default_dtype and torch.set_default_device say
            noise = torch.randn(part.shape, generator=generator, dtype=torch.float32, device="cpu")
            part.copy_(noise.to(torch.promote_types(part.dtype, noise.dtype)).mul_(std))
        if sharded:
            from torch.distributed.tensor import distribute_tensor

            values_here = whole.parameter.to(p.parameter.device)
            mesh, placements = p.parameter.device_mesh, p.parameter.placements  # type: ignore[attr-defined]
            p.parameter.copy_(distribute_tensor(values_here, mesh, placements))


def _can_be_drawn(params: Sequence[ParamInfo]) -> None:
    """Refuse, before the first draw, a model whose parameters no draw can be written into."""
    if shapes := [p.name for p in params if p.parameter.is_meta]:
        raise ValueError(
            f"{shapes[0]} is on the meta device, as are {len(shapes) - 1} more: there is nothing to draw into. Give the model memory"
            " first (model.to_empty(device=...)), then plan.init_(model)"
        )
    for p in params:
        if p.parameter.is_inference():
            raise ValueError(
                f"{p.name} was made under torch.inference_mode, and cannot be trained: build the model outside of it"
            )
        if ROLES[p.role].drawn and p.parameter.dtype not in _DRAWN:
            raise ValueError(
                f"{p.name} is {p.parameter.dtype}, which normal draws cannot be rounded to: plan.init_(model) in float32 or bfloat16"
                " first, and quantise it then"
            )


def _name_without_expert(p: ParamInfo) -> str:
    """One name for the same tensor of every expert of a layer, where experts are modules of their own."""
    stars = p.layout.stars
    return p.layout.starred(p.name, stars.index("layer") + 1 if "layer" in stars else 0)


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    # by name, not by order or shard; 63 of its bits, which are a positive int64
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def param_groups(plan: PlanData, model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups, one per distinct setting, so fused updates stay fused.

    Each group has ``params, lr, weight_decay, eps, betas`` and its ``roles``, and for other optimizers than AdamW what torch's
    own call theirs: ``momentum`` (SGD, Muon), the pair of ``eps`` (Adafactor), ``algorithm`` (``"muon"`` or ``"adamw"``: give
    each kind to its optimizer, or all to ``mue.model.muon.Muon``), Muon's ``adjust_lr_fn`` and ``matrices``. ``initial_lr`` is not in them: schedulers put it there from the ``lr`` that they find, which is
    then also the one that was changed by hand.

    Args:
        plan: folded or not, as the model's forward pass is. model: the planned one, on its final device.

    Raises:
        ValueError: a parameter without a role, or a model of other shapes or multipliers than planned.

    Warns:
        UserWarning: tensors that are trained and not planned, so that they are in no group; stacked or fused matrices under Muon.
    """
    if plan.tuned.optimizer == "muon":
        _warn_of_muon(plan, tensor_plans(plan, model))
    return groups_of(plan, model, stacklevel=5)


def groups_of(plan: PlanData, model: nn.Module, stacklevel: int = 4) -> list[dict[str, Any]]:
    """:func:`param_groups` for an optimizer that moves fused and stacked matrices one by one (:mod:`mue.model.muon`)."""
    tensors = tensor_plans(plan, model)
    if alone := trained_unplanned(model):
        warnings.warn(
            f"{_some(alone)} {'is' if len(alone) == 1 else 'are'} unplanned and in no group: give your optimizer a group for"
            " them, or requires_grad_(False)",
            stacklevel=stacklevel,
        )
    return [{**g, "params": [p.parameter for p in g["params"]]} for g in grouped(plan, tensors)]


def trained_unplanned(model: nn.Module) -> list[str]:
    """Names of the parameters that a model's table says to leave alone, and that are to be trained all the same."""
    if all(row.role != UNPLANNED for row in layout_of(model)):
        return []
    return [name for name, p in placement_of(model).unplanned.items() if p.requires_grad]


def _warn_of_muon(plan: PlanData, tensors: Iterable[TensorPlan]) -> None:
    """Muon orthogonalises a matrix: torch's takes two axes only, and of several matrices in a tensor it would make one."""
    matrices = [s.info for s in tensors if of_tuned(plan.tuned, s.info.role) == "muon"]
    stacked = [p.name for p in matrices if p.parameter.dim() > 2 or p.layout.stacked > 1]
    fused = [p.name for p in matrices if p.layout.parts and p.name not in stacked]
    if stacked:
        warnings.warn(
            f"Muon orthogonalises one matrix at a time, and {_some(stacked)} stack several experts (torch.optim.Muon refuses more than"
            " two axes): use mue.model.muon.Muon.of(plan, model), or experts that are modules of their own",
            stacklevel=4,
        )
    if fused:
        warnings.warn(
            f"{_some(fused)} hold several matrices in one tensor, which Muon would orthogonalise as one, and no rate is derived"
            " for that: give each projection a tensor of its own, or use mue.model.muon.Muon.of(plan, model)",
            stacklevel=4,
        )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


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
            **_torch_names(plan, p, values.eps, scale),
        }
        # few groups: one per tensor would end the fused and foreach updates
        key = tuple(v for k, v in group.items() if k != "params")
        group = groups.setdefault(key, {**group, "roles": []})
        group["params"].append(p)
        if p.role not in group["roles"]:
            group["roles"].append(p.role)
    return list(groups.values())


def _torch_names(plan: PlanData, p: ParamInfo, eps: float, scale: float) -> dict[str, Any]:
    """What torch's other optimizers call a group's settings, and those that only they have."""
    optimizer = plan.tuned.optimizer
    if optimizer == "sgd":
        # β1 is what averages gradients in SGD as well
        return {"momentum": plan.betas[0]}
    if optimizer == "adafactor":
        return {"eps": (eps, ADAFACTOR_FLOOR * scale)}  # eps2 floors rms(W), so it has the weight's scale
    if optimizer != "muon":
        return {}
    if of_tuned(plan.tuned, p.role) == "adamw":
        return {"algorithm": "adamw"}
    scale_fn = UPDATE_SCALES[plan.tuned.update_scale].torch
    return {"algorithm": "muon", "momentum": plan.momentum, "adjust_lr_fn": scale_fn, "matrices": matrices_of(plan, p)}
