"""Faults of weight decay: never applied, applied twice or by another rule, or to the wrong set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.wiring.case import Case
from support.wiring.fault import fault

ANY = r"embed|head|wte|blocks|layers|\.h\."


def _with_decay(c: Case, shrink: Callable[[dict[str, Any]], float]) -> None:
    """The optimizer's step with another decay than its groups say; they say the planned one before it and after it."""
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        planned = [g["weight_decay"] for g in c.optimizer.param_groups]
        with torch.no_grad():
            for g in c.optimizer.param_groups:
                for p in g["params"]:
                    p.mul_(1 - shrink(g))
                g["weight_decay"] = 0.0
        old()
        for g, decay in zip(c.optimizer.param_groups, planned, strict=True):
            g["weight_decay"] = decay

    c.optimizer.step = step  # type: ignore[method-assign]


@fault("weight decay in the groups and not in the step", "moved", ANY)
def _(c: Case) -> None:
    """A fused or wrapped step ignores it: reading the groups back shows nothing."""
    _with_decay(c, lambda g: 0.0)


@fault("weight decay twice in the step", "moved", ANY)
def _(c: Case) -> None:
    """A wrapper decays what the optimizer decays, with the same planned value."""
    _with_decay(c, lambda g: 2 * g["lr"] * g["weight_decay"])


@fault("weight decay not multiplied by the rate", "moved", ANY)
def _(c: Case) -> None:
    """Planned for torch's form and applied independently: w shrinks by wd, and not by lr·wd."""
    _with_decay(c, lambda g: g["weight_decay"])


@fault("weight decay of some tensors on others", "groups", r": weight_decay")
def _(c: Case) -> None:
    """A mask by name matched the wrong set: vectors are decayed, matrices are not."""
    most = max(g["weight_decay"] for g in c.optimizer.param_groups)
    for g in c.optimizer.param_groups:
        g["weight_decay"] = 0.0 if g["weight_decay"] else most


@fault("no weight decay anywhere", "groups", r": weight_decay")
def _(c: Case) -> None:
    """A mask by name matched nothing."""
    for g in c.optimizer.param_groups:
        g["weight_decay"] = 0.0
