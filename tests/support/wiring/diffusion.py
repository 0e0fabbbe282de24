"""Wiring faults of a diffusion transformer, each in a model that is right but for it, and who has to name what."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mue
from mue.checks import Report
from mue.lab.models.diffusion import DiffusionBlock, DiffusionModel
from mue.lab.models.residual import modulated
from support.wiring.fault import around, times

IMAGE = mue.Image(size=8, channels=1, patch=2, classes=3)
# narrower, shallower and without experts, with heads of another size: no multiplier of the plan is 1
BASE = mue.Dense(width=32, ffn=64, layers=1, head_dim=32, image=IMAGE)
SHAPES = {
    "dense": mue.Dense(width=64, ffn=256, layers=2, head_dim=16, image=IMAGE),
    "hybrid": mue.MoE.parse("8e2a1s", width=64, expert=48, layers=2, head_dim=16, image=IMAGE),
    "within an image": mue.MoE.parse(
        "8e2a",
        width=64,
        expert=48,
        layers=2,
        head_dim=16,
        image=IMAGE,
        router="expert-choice",
        router_settings={"within": "sequence"},
    ),
}
TUNED = mue.HParams(lr=4e-3, weight_decay=0.02, init_std=0.1)


@dataclass
class Case:
    """A model with its plan, batch and optimizer; faults change it in place."""

    plan: mue.Plan
    model: DiffusionModel
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, ...]

    def check(self, **more: Any) -> Report:
        return mue.checks.check(self.model, self.plan, self.batch, self.optimizer, raises=False, **more)

    @property
    def blocks(self) -> list[DiffusionBlock]:
        return list(self.model.blocks)  # type: ignore[arg-type]


def case(shape: str) -> Case:
    """The right one."""
    plan = mue.transfer(BASE, SHAPES[shape], TUNED)
    model = DiffusionModel(plan.target, plan.multipliers)
    plan.init_(model)
    draw = torch.Generator().manual_seed(1)
    x, v = (torch.randn(6, 1, 8, 8, generator=draw) for _ in range(2))
    batch = x, torch.rand(6, generator=draw), torch.randint(4, (6,), generator=draw), v
    return Case(plan, model, torch.optim.AdamW(plan.param_groups(model)), batch)


@dataclass(frozen=True)
class Fault:
    """One fault: what it does, to which shape, which check names it, and the pattern of what that has to name."""

    apply: Callable[[Case], None]
    shape: str
    check: str
    where: str


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, check: str, where: str, shape: str = "dense"
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a fault under what somebody did."""

    def keep(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        FAULTS[name] = Fault(apply, shape, check, where)
        return apply

    return keep


Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rewired(
    c: Case,
    *,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated,
    ffn: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated,
    gates: Callable[[Vectors], tuple[Any, Any]] = lambda v: (v[2], v[5]),
    residual: float | None = None,
) -> None:
    """The blocks computed as in the model, but for one line of theirs."""

    def forward(self: DiffusionBlock, x: Tensor, c_BD: Tensor, given: Any = None) -> tuple[Tensor, Any]:
        vectors: Vectors = self.modulation(c_BD).unsqueeze(-2).chunk(6, -1)
        first, second = gates(vectors)
        alpha = self.residual if residual is None else residual
        x = x + alpha * first * self.attention(attention(self.attention_norm(x), *vectors[:2]))
        n, routing = ffn(self.ffn_norm(x), *vectors[3:5]), None
        if self.moe is not None:
            y, routing = self.moe(n)
        else:
            y = self.ffn(n)  # type: ignore[misc]
        return x + alpha * second * y, routing

    for block in c.blocks:
        block.forward = types.MethodType(forward, block)  # type: ignore[method-assign]


def apart(c: Case, pattern: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Give the parameters whose names have a pattern a group of their own with another setting."""
    for name, p in c.model.named_parameters():
        if pattern in name:
            group = next(g for g in c.optimizer.param_groups if any(q is p for q in g["params"]))
            group["params"] = [q for q in group["params"] if q is not p]
            made = {**{k: v for k, v in group.items() if k != "params"}, "params": [p]}
            change(made)
            c.optimizer.param_groups.append(made)


# ---- adaLN-zero --------------------------------------------------------------------------------------------------------------


@fault("attention joins without its gate", "modulation", r"blocks 0 attention")
def _(c: Case) -> None:
    rewired(c, gates=lambda v: (1.0, v[5]))


@fault("feed-forward joins without its gate", "modulation", r"blocks 0 feed-forward", "hybrid")
def _(c: Case) -> None:
    rewired(c, gates=lambda v: (v[2], 1.0))


@fault("both branches behind the attention's gate", "modulation", r"blocks\.0\.modulation")
def _(c: Case) -> None:
    rewired(c, gates=lambda v: (v[2], v[2]))


@fault("a scale without 1 beside it", "modulation", r"blocks 0 feed-forward")
def _(c: Case) -> None:
    rewired(c, ffn=lambda n, shift, scale: n * scale + shift)


@fault("the feed-forward reads a norm that is not modulated", "modulation", r"blocks 0 feed-forward", "hybrid")
def _(c: Case) -> None:
    rewired(c, ffn=lambda n, shift, scale: n)


@fault("the head reads a norm that is not modulated", "modulation, moved", r"head\.weight|final_modulation\.weight")
def _(c: Case) -> None:
    around(c.model.final_modulation, lambda old, x: torch.zeros(*x.shape[:-1], 2 * x.shape[-1]))


@fault("modulations drawn as other matrices", "init", r"blocks\.0\.modulation\.weight")
def _(c: Case) -> None:
    with torch.no_grad():
        for block in c.blocks:
            block.modulation.weight.normal_(std=0.05)


@fault("modulations in the embeddings' group", "groups", r"blocks\.0\.modulation\.weight")
def _(c: Case) -> None:
    apart(c, "modulation", lambda group: group.update(lr=c.plan.roles["patch_embedding"].values.lr))


# ---- condition and patches -------------------------------------------------------------------------------------------------


@fault("the time is detached from the loss", "moved", r"time_in\.weight")
def _(c: Case) -> None:
    around(c.model.time_out, lambda old, x: F.linear(x.detach(), c.model.time_out.weight))


@fault("the class is left out of the condition", "moved", r"class_embedding\.weight")
def _(c: Case) -> None:
    around(c.model.class_embedding, lambda old, x: torch.zeros(*x.shape, c.plan.target.width))


@fault("the time's second matrix learns as the first", "groups", r"time_out\.weight")
def _(c: Case) -> None:
    apart(c, "time_out", lambda group: group.update(lr=c.plan.roles["time_embedding_in"].values.lr))


@fault("patches drawn by their fan-in", "init", r"patch_embedding\.weight")
def _(c: Case) -> None:
    nn.init.kaiming_uniform_(c.model.patch_embedding.weight, a=math.sqrt(5))


@fault("patches multiplied by √width", "multipliers", r"patch_embedding\.weight")
def _(c: Case) -> None:
    times(c.model.patch_embedding, c.plan.target.width**0.5)


# ---- what it shares with the language model ------------------------------------------------------------------------------------


@fault("a causal mask over patches", "attention scale", r"blocks\.0\.attention\.q\.weight")
def _(c: Case) -> None:
    for block in c.blocks:
        block.attention.causal = True


@fault("attention scaled by 1/√head_dim", "attention scale", r"blocks\.0\.attention\.q\.weight")
def _(c: Case) -> None:
    for block in c.blocks:
        block.attention.scale = c.plan.target.head_dim**-0.5


@fault("no residual multiplier", "multipliers", r"blocks\.0\.attention\.o\.weight")
def _(c: Case) -> None:
    rewired(c, residual=1.0)


@fault("no output multiplier", "multipliers", r"blocks\.0\.moe\.shared_down", "hybrid")
def _(c: Case) -> None:
    for block in c.blocks:
        assert block.moe is not None
        block.moe.output_multiplier = 1.0


@fault("no route scale", "multipliers", r"blocks\.0\.moe\.(router|experts_down)", "hybrid")
def _(c: Case) -> None:
    for block in c.blocks:
        assert block.moe is not None and block.moe.router is not None
        block.moe.router.route_scale = 1.0


@fault("no head multiplier", "multipliers", r"head\.weight")
def _(c: Case) -> None:
    c.model.multipliers = replace(c.model.multipliers, head=1.0)


@fault("experts choose from the whole batch", "samples", r"blocks\.0\.moe\.router", "within an image")
def _(c: Case) -> None:
    for block in c.blocks:
        assert block.moe is not None and block.moe.router is not None
        settings = {**block.moe.router.options.settings, "within": "batch", "evaluation": "batch"}
        block.moe.router.options = replace(block.moe.router.options, settings=settings)
