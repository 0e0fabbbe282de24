"""What exports are held against: plans in which every value differs, and (lr, weight decay, eps), std and constant by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mue
from mue.api import Plan
from mue.export.skeleton import Skeleton
from mue.layouts.layout import canonical
from mue.model.matrices import matrices_of
from mue.model.tensor_plan import tensor_plans
from mue.plan.fold import folded_values
from mue.rules.optimizers import of_tuned
from mue.shapes.update_scales import converted

SIZES: dict[str, Any] = {"head_dim": 16, "kv_heads": 2, "vocab": 80}
EXPERTS = mue.Block(layers=2, experts=8, active=2, expert=32, shared_experts=1, shared=48, router="softmax")
TARGETS = {
    "dense": mue.Dense(64, 96, 2, **SIZES),
    "dense, then experts": mue.Mixed(64, (mue.Block(layers=1, ffn=96), EXPERTS), **SIZES),
    "experts": mue.MoE.parse("8e3a", width=64, expert=32, layers=2, **SIZES),
    "tied": mue.MoE.parse("8e2a", width=64, expert=32, layers=2, tied=True, **SIZES),
}
ALL = pytest.mark.parametrize("kind", TARGETS)
Values = dict[str, tuple[float, float, float]]
MUON = mue.HParams(
    lr=0.02,
    adamw_lr=4e-3,
    weight_decay=0.1,
    adamw_weight_decay=0.05,
    init_std=0.02,
    eps=1e-9,
    optimizer="muon",
    momentum=0.9,
)


@cache
def plan(kind: str) -> Plan:
    """From a base of other width, depth, expansion and, per third of the depth, another lr: every value differs."""
    target = TARGETS[kind]
    base = mue.Dense(32, 48, 6, head_dim=16, vocab=80, tied=target.tied)
    roles = {"head": {"lr_times": 1.5}, "last_third": {"attention_o": {"lr_times": 2.0}}}
    tuned = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02, eps=1e-9, floor=0.1, clip=1.0, roles=roles)
    return mue.transfer(base, target, tuned)


def run(text: str) -> dict[str, Any]:
    """What an exported file defines."""
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    return namespace


def planned(folded: Plan, model: Skeleton, extra: dict[str, float] | None = None) -> Values:
    """(lr, weight decay, eps) by name, straight from the plan's settings."""
    found = {}
    for s in tensor_plans(folded, model):
        v = folded_values(folded, s.info.role, s.values, (extra or {}).get(s.info.layout.pattern, 1.0))
        assert v.lr is not None and v.weight_decay is not None and v.eps is not None
        found[s.info.name] = (v.lr, v.weight_decay, v.eps)
    return found


def planned_muon(folded: Plan, model: Skeleton, scale: str) -> dict[str, tuple[float, ...]]:
    """The same under Muon: (lr, weight decay) in a convention of the rate where Muon moves it, with eps where AdamW does."""
    found: dict[str, tuple[float, ...]] = {}
    for s in tensor_plans(folded, model):
        v = s.values
        assert v.lr is not None and v.weight_decay is not None and v.eps is not None
        if of_tuned(folded.tuned, s.info.role) == "adamw":
            found[s.info.name] = (v.lr, v.weight_decay, v.eps)
            continue
        _, _, (out, *_), *_ = matrices_of(folded, s.info)
        own = folded.tuned.update_scale
        found[s.info.name] = (
            converted(v.lr, v.weight_decay, own, scale, out, s.info.fan_in) if own != scale else (v.lr, v.weight_decay)
        )
    return found


def built_muon(
    model: nn.Module, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], eps: str = "eps"
) -> dict[str, tuple[float, ...]]:
    """The same, read from the groups that Muon has and those that AdamW has; ``eps``: what the latter call it."""
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in muon for p in g["params"]}
    found |= {names[id(p)]: (g["lr"], g["weight_decay"], g[eps]) for g in adamw for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in (*muon, *adamw)) == len(list(model.parameters()))
    return found


def built(model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Values:
    """The same, read from an optimizer."""
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    assert all(tuple(g["betas"]) == betas for g in groups)
    assert len({(g["lr"], g["weight_decay"], g["eps"]) for g in groups}) == len(groups)
    found = {names[id(p)]: (g["lr"], g["weight_decay"], g["eps"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return found


def starts(
    folded: Plan, model: Skeleton, extra: dict[str, float] | None = None
) -> dict[str, tuple[float | None, float | None]]:
    """(std, constant) by name."""
    scale = extra or {}
    return {
        s.info.name: (
            None if s.values.init_std is None else s.values.init_std * scale.get(s.info.layout.pattern, 1.0),
            s.constant,
        )
        for s in tensor_plans(folded, model)
    }


def assert_drawn(model: nn.Module, wanted: dict[str, tuple[float | None, float | None]]) -> None:
    """Every tensor has its planned std (five standard errors) or constant."""
    for raw, parameter in model.named_parameters():
        std, constant = wanted[canonical(raw)]
        x: Tensor = parameter.detach()
        if std is None:
            assert constant is not None
            assert torch.allclose(x, torch.full_like(x, constant)), raw
        else:
            assert float(x.std()) == pytest.approx(std, rel=5 / (2 * x.numel()) ** 0.5), raw
            assert abs(float(x.mean())) < 5 * std / x.numel() ** 0.5, raw


def same_parameters(made: nn.Module, table: Skeleton) -> None:
    """A stack's own model has exactly the names and shapes that the table gives the planned shape."""
    here = {n: tuple(p.shape) for n, p in made.named_parameters()}
    assert here == {n: tuple(p.shape) for n, p in table.named_parameters()}
