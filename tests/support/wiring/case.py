"""One rightly wired model with everything that ``mue.check`` may be given, and what faults have to know of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.checks import Report
from mue.fold import clip_grad_norm_, coefficients, fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import ParamInfo
from mue.layouts.of_model import placed
from mue.layouts.transformers.idle import idle_in_family
from mue.model.muon import Muon
from support.wiring.carried import Carried, Knob, cancelled, owner
from support.wiring.families import TRAININGS, TUNED, Stock, build_stock, stock_family, tokens_of

BASE = mue.Dense(width=32, ffn=64, layers=1, head_dim=32, sequence=32, vocab=96)
OURS = {
    "mue hybrid": mue.MoE.parse("8e4a2g1s", width=64, expert=48, layers=2, head_dim=16, sequence=32, vocab=96),
    "mue dense, tied": mue.Dense(width=64, ffn=256, layers=2, head_dim=16, sequence=32, vocab=96, tied=True),
}
FOLDED, ROUTED, MULTIPLIERS = "folded", "folded, R in the model", "multipliers"
MUON = {"optimizer": "muon", "lr": 0.02, "adamw_lr": 4e-3, "update_scale": "keller"}


@dataclass
class Case:
    """A model and all that belongs to its training; faults change it in place.

    Attributes:
        form: how the plan's multipliers are carried: :data:`FOLDED`, :data:`ROUTED` or :data:`MULTIPLIERS`.
        stock: what is known of the family; None for the lab's own model. autocast: the forward pass runs in bf16.
    """

    family: str
    form: str
    plan: mue.Plan
    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    clip: Callable[[], Any] | None = None
    checkpoint: Any = None
    stock: Stock | None = None
    autocast: bool = False

    @property
    def ours(self) -> bool:
        return self.family in OURS

    @property
    def inner(self) -> nn.Module:
        """The family's own model, inside what carries the multipliers."""
        return self.model.stock if isinstance(self.model, Carried) else self.model

    @property
    def knobs(self) -> list[Knob]:
        return self.model.knobs if isinstance(self.model, Carried) else []

    def of(self, *roles: str) -> list[ParamInfo]:
        """The tensors of some roles, also where they are fused with others."""
        return [p for p in placed(self.model) if {p.role, *p.layout.parts} & set(roles)]

    def module(self, p: ParamInfo) -> nn.Module:
        """The module that owns a tensor."""
        return owner(self.model, p)

    def experts(self) -> dict[int, nn.Module]:
        """Layer → the module that is handed indices and weights of experts."""
        return {} if self.stock is None else {i: self.inner.get_submodule(n) for i, n in self.stock.experts.items()}

    def layers(self) -> list[nn.Module]:
        """The blocks."""
        first = next(p for p in placed(self.model) if p.layer is not None)
        prefix = re.split(r"\.\d+\.", first.name)[0]
        blocks: Any = self.model.get_submodule(prefix)
        return list(blocks)

    def group(self, p: ParamInfo) -> dict[str, Any]:
        """The optimizer group that holds a tensor."""
        return next(g for g in self.optimizer.param_groups if any(q is p.parameter for q in g["params"]))

    def apart(self, *roles: str) -> list[dict[str, Any]]:
        """Groups of their own, with unchanged values, for the tensors of some roles."""
        made = []
        for p in self.of(*roles):
            old = self.group(p)
            old["params"] = [q for q in old["params"] if q is not p.parameter]
            new = {**{k: v for k, v in old.items() if k != "params"}, "params": [p.parameter]}
            self.optimizer.param_groups.append(new)
            made.append(new)
        return made

    def low(self) -> Case:
        """The same in bfloat16."""
        self.model.bfloat16()
        for module in self.model.modules():
            if isinstance(getattr(module, "turn", None), Tensor):
                module.turn = module.turn.float()  # the table of rotations stays in float32
        return self

    def check(self, **more: Any) -> Report:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return mue.checks.check(
                self.model,
                self.plan,
                self.batch,
                self.optimizer,
                self.scheduler,
                clip=self.clip,
                checkpoint=self.checkpoint,
                raises=False,
                **more,
            )


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


def right_clip(made: Case) -> Callable[[], Tensor]:
    """Clipping as a folded plan needs it: by the norm that the gradients would have unfolded (docs/why/fold.md)."""

    def clip() -> Tensor:
        assert made.plan.tuned.clip is not None
        folds = coefficients(made.plan, made.model)
        return clip_grad_norm_(made.model.parameters(), made.plan.tuned.clip, coefficients=folds)

    return clip


@cache
def forms(family: str) -> tuple[str, ...]:
    """How a family can carry a plan's multipliers, its usual form first."""
    if family in OURS:
        return (MULTIPLIERS,)
    stock = stock_family(family)
    model = build_stock(stock.config)
    # a declared layout cannot say that a parameter only chooses, and is given no gradient by the family's code
    carries = not cancelled(model) and not idle_in_family(model)
    return (*([ROUTED] if stock.routed is not None else []), FOLDED, *([MULTIPLIERS] if carries else []))


def case(family: str, seed: int = 0, form: str = "", muon: bool = False) -> Case:
    """A right case of a family; every multiplier of it that can be carried differs from 1.

    Args:
        muon: planned for and trained with Muon and the AdamW beside it, in place of AdamW alone.

    Raises:
        ValueError: a plan that cannot be made for Muon.
    """
    form = form or forms(family)[0]
    stock = None if family in OURS else stock_family(family)
    tokens = tokens_of(seed)
    more = MUON if muon else {}
    if stock is None:
        plan = mue.transfer(BASE, OURS[family], TUNED.replace(**more), **TRAININGS)
        model: nn.Module = LanguageModel(OURS[family], plan.multipliers)
        batch: Any = (tokens, tokens.roll(-1, 1))
    else:
        model = build_stock(stock.routed if form == ROUTED else stock.config, seed)
        unfolded = stock.plan.retuned(**more)
        plan = unfolded if form == MULTIPLIERS else fold(unfolded, "model" if form == ROUTED else "weights")
        model = Carried(model, stock) if form == MULTIPLIERS else model
        batch = {"input_ids": tokens, "labels": tokens}
    plan.init_(model, seed)
    optimizer = Muon.of(plan, model) if muon else torch.optim.AdamW(plan.param_groups(model))
    made = Case(family, form, plan, model, batch, optimizer, warmup(optimizer), None, {"plan": plan.hash}, stock)
    if plan.tuned.clip is not None:
        made.clip = right_clip(made)
    return made


def right(family: str, seed: int = 0) -> Iterator[Case]:
    """Every right case of a family: each form in float32, the usual one under autocast too. What fails in them is a false alarm."""
    for form in forms(family):
        yield case(family, seed, form)
    if runs_in_bf16(family):
        low = case(family, seed)
        low.autocast = True
        yield low


@cache
def runs_in_bf16(family: str) -> bool:
    """Whether a family's own code runs under autocast (DBRX's adds two types up)."""
    made = case(family)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            made.model(**made.batch) if isinstance(made.batch, dict) else made.model(*made.batch)
    except RuntimeError:
        return False
    return True
