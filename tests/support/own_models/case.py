"""One of the three models with its plan, batch, optimizer and schedule, as a training script builds them; right, or with one slip."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mue
from support.own_models.fused import Fused
from support.own_models.lists import Lists
from support.own_models.tied import Tied

STEPS, D = 200, 32
TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.1)
IDS = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {"vocab": 128, "sequence": 32}
DENSE = mue.Block(layers=1, ffn=4 * D)
ROUTED = mue.Block(layers=1, experts=4, active=2, expert=D, router="softmax")
SHAPES: dict[str, tuple[Any, Any]] = {
    "fused": (
        mue.Dense(16, 16, 1, head_dim=16, **COMMON),
        mue.MoE.parse("8e2a1s", width=D, expert=24, layers=2, head_dim=8, **COMMON),
    ),
    "lists": (
        mue.Dense(16, 64, 1, head_dim=16, gated=False, **COMMON),
        mue.MoE.parse("4e2a", width=D, expert=D, layers=2, head_dim=8, gated=False, router="softmax", **COMMON),
    ),
    "tied": (
        mue.Dense(16, 64, 1, head_dim=16, gated=False, tied=True, **COMMON),
        mue.Mixed(D, (DENSE, ROUTED), head_dim=8, gated=False, tied=True, **COMMON),
    ),
}


@dataclass(frozen=True)
class Slip:
    """What one wrong script does otherwise.

    Attributes:
        named: what the error has to say (a regular expression). kind: whose slip it is.
        wrong: words that the model's code knows. rows: layout rows in the place of its own. shape: of the model that is built.
        after: done to the model once it is drawn. groups: made of the plan's groups. optimizer, scheduler: instead of the right ones.
        forward: whose multipliers the model is built with, of the plan's two forms; init: whose start it is drawn with.
        folded: whether the plan is.
    """

    kind: str
    named: str
    wrong: Collection[str] = ()
    rows: Mapping[str, mue.Layout] = field(default_factory=dict)
    shape: Callable[[Any], Any] = lambda shape: shape
    after: Callable[[Any], object] = lambda model: None
    groups: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda groups: groups
    optimizer: Callable[[list[dict[str, Any]]], Any] = torch.optim.AdamW
    scheduler: Callable[[Any], Any] | None = None
    forward: str = ""
    init: str = ""
    folded: bool = False
    only_loss: bool = False


def cosine(optimizer: Any, warmup: int = 10, steps: int = STEPS) -> Any:
    """Warmup and cosine as a factor."""
    factor = lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps)))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the model that returns logits."""
    return cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:])


def check(slip: Slip, **options: Any) -> mue.checks.Report:
    """Build it all as README says, but for the slip, and check it.

    Raises:
        ValueError: whatever finds the slip: the layout, the plan's fit, the groups or the check.
    """
    base, target = SHAPES[slip.kind]
    runs = {"base_training": mue.Training(4096, STEPS), "training": mue.Training(8192, STEPS)}
    forms = {"plain": mue.transfer(base, target, TUNED, **runs)}
    forms["folded"] = mue.fold.fold(forms["plain"])
    plan = forms["folded" if slip.folded else "plain"]
    multipliers = forms[slip.forward].multipliers if slip.forward else plan.multipliers
    shape = slip.shape(target)
    model: Any
    batch: Any
    if slip.kind == "fused":
        model, batch = Fused(shape, multipliers, slip.wrong), IDS[:, :-1]
        options["loss"] = own_loss
    elif slip.kind == "lists":
        model, batch = Lists(shape, multipliers, slip.wrong, slip.only_loss), (IDS[:, :-1], IDS[:, 1:])
    else:
        model, batch = Tied(shape, multipliers, slip.wrong), {"ids": IDS, "labels": IDS}
        batch = {name: ids[:, :-1] for name, ids in batch.items()}
    model.rows = dict(slip.rows)
    (forms[slip.init] if slip.init else plan).init_(model)
    slip.after(model)
    optimizer = slip.optimizer(slip.groups(plan.param_groups(model)))
    scheduler = (slip.scheduler or cosine)(optimizer)
    return mue.check(model, plan, batch, optimizer, scheduler, **options)
