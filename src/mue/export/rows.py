"""A plan on a model as rows ``name pattern → values``: what every stack's dialect is written from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mue.plan import Plan
from mue.roles import Placed
from mue.rules.table import BUFFERS
from mue.settings import Setting, settings


@dataclass(frozen=True)
class ExportRow:
    """One line of an export.

    Attributes:
        pattern: regular expression that matches the whole canonical name. roles: for people.
        lr, weight_decay, eps: absolute values. std: of a normal draw; None for vectors. constant: what a vector starts at;
            None where it keeps the model's own start (or ``std`` is given).
    """

    pattern: str
    roles: str
    lr: float
    weight_decay: float
    eps: float
    std: float | None
    constant: float | None


def rows(plan: Plan, model: nn.Module) -> list[ExportRow]:
    """One row for each kind of parameter and distinct setting; layers are listed only where they differ.

    Args:
        model: the planned model; the meta device will do.

    Raises:
        ValueError: a model that is not the planned one; a plan for another optimizer than AdamW; experts that all start
            from one draw, which no stack can express.
    """
    if plan.tuned.optimizer != "adamw":
        raise ValueError(
            f"exports speak AdamW, and this plan is for {plan.tuned.optimizer!r}: use mue.apply in your own loop"
        )
    kinds: dict[str, dict[ExportRow, list[Placed]]] = {}
    for s in settings(plan, model):
        if s.placed.role in BUFFERS:
            continue
        if plan.role(s.placed.role, s.placed.layer).init == "shared":
            raise ValueError(
                f"{s.placed.name}: experts that start from one draw cannot be exported; call plan.init_ instead"
            )
        kinds.setdefault(s.placed.layout.pattern, {}).setdefault(_row(s), []).append(s.placed)
    found = []
    for pattern, settled in kinds.items():
        for row, placed in settled.items():
            text = _regex(pattern) if len(settled) == 1 else _some_layers(pattern, placed)
            found.append(ExportRow(text, *list(vars(row).values())[1:]))
    return found


def _row(s: Setting) -> ExportRow:
    v = s.values
    assert v.lr is not None and v.weight_decay is not None and v.eps is not None
    roles = " + ".join(s.placed.layout.parts) or s.placed.role
    return ExportRow("", roles, v.lr, v.weight_decay, v.eps, v.init_std, s.constant)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"[^.]+")


def _some_layers(pattern: str, placed: Sequence[Placed]) -> str:
    """The pattern with its first star narrowed to the layers that share a setting."""
    layers = "|".join(str(i) for i in sorted({p.layer for p in placed if p.layer is not None}))
    return re.escape(pattern).replace(r"\*", f"(?:{layers})", 1).replace(r"\*", r"[^.]+")
