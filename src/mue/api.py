"""What users hold: :class:`Plan`, and :func:`transfer`, which makes one.

The numbers and how they come about are :mod:`mue.plan`, which knows no model; here is what reaches up from them: onto a torch
model, into another stack's file, onto a screen. torch is imported when a plan meets a model, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec

from mue.plan import render, replan
from mue.plan import transfer as transfers
from mue.plan.plan import PlanData

if TYPE_CHECKING:
    from torch import nn

P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class Plan(PlanData):
    """Every hyperparameter of the target, role by role. Made by :func:`mue.transfer`; equal where :attr:`hash` is.

    It has no fields of its own: functions of the library take :class:`mue.plan.plan.PlanData`, and so a plan.
    """

    @classmethod
    def of(cls, data: PlanData) -> Plan:
        """A plan's data as what users hold, and the plan that it starts from, where it starts from one, too."""
        own = {f.name: getattr(data, f.name) for f in fields(PlanData)}
        if isinstance(base := data.inputs.base, PlanData) and not isinstance(base, cls):
            own["inputs"] = replace(data.inputs, base=cls.of(base))
        return cls(**own)

    # ---- on a model ---------------------------------------------------------------------------------------------

    def init_(self, model: nn.Module, seed: int = 0) -> None:
        """Draw every parameter as planned, in place; see :func:`mue.model.apply.init_`."""
        from mue.model.apply import init_

        init_(self, model, seed=seed)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups, one per distinct setting; see :func:`mue.model.apply.param_groups`."""
        from mue.model.apply import param_groups

        return param_groups(self, model)

    def export(self, to: str, model: Any = None) -> str:
        """The plan as a file of another training stack; see :func:`mue.export.export`."""
        from mue.export import export

        return export(self, to, model)

    # ---- made again ---------------------------------------------------------------------------------------------

    def retuned(self, **changes: Any) -> Plan:
        """The same transfer from other tuned values (``lr=…, weight_decay=…``), through any chain of plans."""
        return self.of(replan.retuned(self, **changes))

    def scaled(self, multiplier: float) -> Plan:
        """The same transfer with every tuned learning rate times ``multiplier``."""
        return self.of(replan.scaled(self, multiplier))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan back; ``ValueError`` if the file is no plan, or its numbers are not those that follow from its inputs."""
        return cls.of(replan.load(path))

    # ---- printed ------------------------------------------------------------------------------------------------

    def header(self) -> list[tuple[str, str]]:
        """The plan in a few lines: (what, value)."""
        return render.header(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and one line per role present (per block where blocks differ): values, factors, source and mark."""
        return render.table(self)

    def __str__(self) -> str:
        return render.text(self)


def _for_users(make: Callable[P, PlanData]) -> Callable[P, Plan]:
    """``make`` with what it returns as a :class:`Plan`; documentation and the rest of the signature stay its own."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Plan:
        return Plan.of(make(*args, **kwargs))

    made.__module__ = __name__  # where pickle looks for it, and with it a pool of processes
    made.__signature__ = signature(make).replace(return_annotation=Plan.__name__)  # type: ignore[attr-defined]
    return made


transfer = _for_users(transfers.transfer)
