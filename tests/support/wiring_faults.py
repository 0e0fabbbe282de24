"""Faults of wiring, each as a change of a right case: what it is, where it is possible, and the name a check must give.

A check that only says "something is wrong" sends its user searching, so a fault counts as found where its culprit is
named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.wiring_cases import OURS, STOCK, Case, case

H, T = OURS
M, Q, S = STOCK
ALL, MOE, HF, MINE = (H, T, M, Q, S), (H, M, Q, S), (M, Q, S), (H, T)
FFN = r"(ffn|mlp|moe|shared|experts)\S*down"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        families: of cases in which it is possible. apply: puts it into a right case.
        culprit: a pattern that must be found in the place that a failing finding names.
    """

    families: tuple[str, ...]
    apply: Callable[[Case], None]
    culprit: str


FAULTS: dict[str, Fault] = {}
"""Every fault by its name, once :func:`load` was called."""


def fault(
    name: str, families: tuple[str, ...], culprit: str
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function that puts a fault into a case (:class:`Fault`)."""

    def keep(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        assert name not in FAULTS
        FAULTS[name] = Fault(families, apply, culprit)
        return apply

    return keep


def broken(name: str, family: str) -> Case:
    """A case of ``family`` with one fault in it."""
    made = case(family)
    FAULTS[name].apply(made)
    return made


# ---- tools ---------------------------------------------------------------------------------------------------------------


def around(module: nn.Module, change: Callable[..., Any]) -> None:
    """Replace a module's forward by ``change(old forward, *args, **kwargs)``."""
    old = module.forward
    module.forward = lambda *args, **kwargs: change(old, *args, **kwargs)  # type: ignore[method-assign]


def times(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns (the first of several results)."""

    def change(old: Any, *args: Any, **kwargs: Any) -> Any:
        out = old(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    around(module, change)


def branches(c: Case) -> list[nn.Module]:
    """The feed-forward of every block, dense or with experts."""
    if c.ours:
        return [b.ffn if b.ffn is not None else b.moe for b in c.model.blocks]  # type: ignore[union-attr]
    return [layer.mlp for layer in c.model.model.layers]  # type: ignore[union-attr]


def attentions(c: Case) -> list[nn.Module]:
    if c.ours:
        return [b.attention for b in c.model.blocks]  # type: ignore[union-attr]
    return [layer.self_attn for layer in c.model.model.layers]  # type: ignore[union-attr]


def last_moe(c: Case) -> nn.Module:
    return branches(c)[-1]


def routers(c: Case) -> list[nn.Module]:
    return [c.module(p) for p in c.of("router")]


@torch.no_grad()
def scale(tensors: list[Any], factor: float) -> None:
    for p in tensors:
        p.parameter.mul_(factor)


def regroup(c: Case, groups: list[dict[str, Any]], **more: Any) -> None:
    """A new optimizer (and warmup) of other groups."""
    c.optimizer = torch.optim.AdamW(groups, **more)
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambda step: min(1.0, (step + 1) / 10))


def load() -> dict[str, Fault]:
    """All faults; they stand in two files that fill :data:`FAULTS` as they are imported."""
    from support import wiring_faults_forward, wiring_faults_training

    assert wiring_faults_forward and wiring_faults_training
    return FAULTS
