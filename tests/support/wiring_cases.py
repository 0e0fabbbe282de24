"""Rightly wired models of several families, each with everything ``mue.check`` may be given: what the mutation suite breaks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.checks import Report
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import ParamInfo
from mue.layouts.of_model import placed

BASE = mue.Dense(width=32, ffn=64, layers=1, head_dim=32, sequence=32, vocab=96)
TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.04, eps=1e-10)
TRAININGS = {"base_training": mue.Training(1024, 100), "training": mue.Training(1024, 400)}
OURS = {
    "mue hybrid": mue.MoE.parse("8e4a2g1s", width=64, expert=48, layers=2, head_dim=16, sequence=32, vocab=96),
    "mue dense, tied": mue.Dense(width=64, ffn=256, layers=2, head_dim=16, sequence=32, vocab=96, tied=True),
}
STOCK: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v3": {"routed_scaling_factor": 2.0, "first_k_dense_replace": 1},
}
FAMILIES = (*OURS, *STOCK)


@dataclass
class Case:
    """A model and all that belongs to its training; faults change it in place."""

    family: str
    plan: mue.Plan
    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    clip: Callable[[], Any] | None = None
    checkpoint: Any = None

    @property
    def ours(self) -> bool:
        return self.family in OURS

    def of(self, *roles: str) -> list[ParamInfo]:
        """The tensors of some roles, also where they are fused with others."""
        return [p for p in placed(self.model) if {p.role, *p.layout.parts} & set(roles)]

    def low(self) -> Case:
        """The same in bfloat16."""
        self.model.bfloat16()
        for module in self.model.modules():
            if isinstance(getattr(module, "turn", None), Tensor):
                module.turn = module.turn.float()  # the table of rotations stays in float32
        return self

    def module(self, placed: ParamInfo) -> nn.Module:
        """The module that owns a tensor."""
        owner = (
            placed.name.removesuffix(".weight") if placed.name.endswith(".weight") else placed.name.rpartition(".")[0]
        )
        return self.model.get_submodule(owner)

    def group(self, placed: ParamInfo) -> dict[str, Any]:
        """The optimizer group that holds a tensor."""
        return next(g for g in self.optimizer.param_groups if any(p is placed.parameter for p in g["params"]))

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

    def check(self, **more: Any) -> Report:
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


def case(family: str, seed: int = 0) -> Case:
    """A right case of one of :data:`FAMILIES`; every multiplier of it differs from 1."""
    plan, model = ours(family) if family in OURS else stock(family, seed)
    plan.init_(model, seed)
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(seed))
    batch = (tokens, tokens.roll(-1, 1)) if family in OURS else {"input_ids": tokens, "labels": tokens}
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    made = Case(family, plan, model, batch, optimizer, schedule, checkpoint={"plan": plan.hash})
    if plan.tuned.clip is not None:
        made.clip = right_clip(made)
    return made


def right_clip(made: Case) -> Callable[[], Tensor]:
    """Clipping as a folded plan needs it: by the norm that the gradients would have unfolded (conventions 7)."""
    from mue.fold import clip_grad_norm_, coefficients

    def clip() -> Tensor:
        c = coefficients(made.plan, made.model)
        assert made.plan.tuned.clip is not None
        return clip_grad_norm_(made.model.parameters(), made.plan.tuned.clip, coefficients=c)

    return clip


def ours(family: str) -> tuple[mue.Plan, LanguageModel]:
    """The lab's model with a plan's multipliers in its forward pass."""
    plan = mue.transfer(BASE, OURS[family], TUNED, **TRAININGS)  # type: ignore[arg-type]
    return plan, LanguageModel(OURS[family], plan.multipliers)


_known: dict[str, tuple[Any, mue.Plan]] = {}


def stock(family: str, seed: int) -> tuple[mue.Plan, nn.Module]:
    """A tiny model of a transformers family with a folded plan: nothing of its forward code is changed."""
    from mue.fold import fold
    from mue.layouts.inspect import inspect
    from mue.layouts.transformers.configs import build, default_config
    from mue.layouts.transformers.family import family_of
    from mue.layouts.transformers.tiny import shrink

    if family not in _known:
        config = shrink(default_config(family), 2, family_of(family).tiny)
        for key, value in STOCK[family].items():
            setattr(config, key, value)
        shape = inspect(config).shape
        assert shape is not None
        base = mue.Dense(width=32, ffn=64, layers=1, head_dim=8)
        plan = mue.transfer(base, shape, TUNED.replace(clip=1.0), **TRAININGS)  # type: ignore[arg-type]
        _known[family] = (config, fold(plan, "model" if family == "deepseek_v3" else "weights"))
    config, plan = _known[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = build(copy.deepcopy(config))
    model.set_experts_implementation("eager")  # type: ignore[operator]
    return plan, model


def right(families: tuple[str, ...], seeds: range) -> Iterator[tuple[str, int, Report]]:
    """Reports of right models: any failure in them is a false alarm."""
    for family in families:
        for seed in seeds:
            yield family, seed, case(family, seed).check()
