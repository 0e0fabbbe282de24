"""A plan on a model as rows ``name pattern → values``: what every stack's dialect is written from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mue.layouts.layout import UNPLANNED, Layout, ParamInfo
from mue.layouts.of_model import layout_of
from mue.model.apply import trained_unplanned
from mue.model.matrices import Matrices, matrices_of
from mue.model.tensor_plan import TensorPlan, tensor_plans
from mue.plan.fold import fold, folded_values
from mue.plan.plan import PlanData
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.shapes import Transformer


@dataclass(frozen=True)
class ExportRow:
    """One line of an export.

    Attributes:
        pattern: canonical name in which ``*`` stands for one dotted part (or the number at its end); the first is the layer.
        layers: the layers it holds in; None for all that have such a parameter.
        roles: for people.
        lr, weight_decay, eps: absolute values. std: of a normal draw; None for vectors. constant: what a vector starts at;
            None where it keeps the model's own start (or ``std`` is given).
        matrices: how the tensor holds the matrices that Muon moves one by one (:func:`mue.model.matrices.matrices_of`), fan_in: the inputs
            of each; None and 0 where AdamW moves it.
    """

    pattern: str
    layers: tuple[int, ...] | None
    roles: str
    lr: float
    weight_decay: float
    eps: float
    std: float | None
    constant: float | None
    matrices: Matrices | None = None
    fan_in: int = 0

    @property
    def setting(self) -> tuple[float, float, float]:
        """What an optimizer's group is told: lr, weight decay, eps."""
        return self.lr, self.weight_decay, self.eps

    @property
    def regex(self) -> str:
        """A regular expression for the whole name."""
        text = re.escape(self.pattern)
        if self.layers is not None:
            text = text.replace(r"\*", f"(?:{'|'.join(map(str, self.layers))})", 1)
        return text.replace(r"\*", r"[^.]+")

    @property
    def globs(self) -> list[str]:
        """The same for the shell's way of matching (whose ``*`` also crosses dots): one for each layer where they differ."""
        if self.layers is None:
            return [self.pattern]
        return [self.pattern.replace("*", str(layer), 1) for layer in self.layers]


def refuse_images(target: Transformer) -> None:
    """``ValueError`` for a shape that draws images, where the model to write for is not the user's but one that mue knows."""
    if target.image is not None:
        raise ValueError(
            f"{target.name} draws images, and the models that mue knows of stacks are language models: give the planned module"
        )


def folded(plan: PlanData) -> PlanData:
    """The plan without forward multipliers; one that is folded already stays as it is, whoever carries R in it."""
    return plan if plan.folding is not None else fold(plan)


def rows(
    plan: PlanData,
    model: nn.Module,
    extra: Mapping[str, float] | None = None,
    optimizers: Sequence[str] = ("adamw",),
) -> list[ExportRow]:
    """One row for each kind of parameter and distinct setting; layers are listed only where they differ.

    Args:
        model: the planned model; the meta device will do.
        extra: pattern of a layout row → what is folded into its tensors beyond the plan's own fold.
        optimizers: that the stack's file has words for.

    Raises:
        ValueError: a model that is not the planned one; a plan for an optimizer that the stack has no words for; experts that all
            start from one draw, which no stack can express.
    """
    if plan.tuned.optimizer not in optimizers:
        spoken = " and ".join({"adamw": "AdamW", "muon": "Muon"}.get(name, name) for name in optimizers)
        raise ValueError(
            f"exports speak {spoken}, and this plan is for {plan.tuned.optimizer!r}: use mue.model.apply in your own loop"
        )
    kinds: dict[str, dict[ExportRow, list[ParamInfo]]] = {}  # by pattern
    for s in tensor_plans(plan, model):
        if not ROLES[s.info.role].trained:
            continue
        # each stack draws tensor by tensor; one draw for N tensors has no place in any of their configs
        if plan.role(s.info.role, s.info.layer).init == "shared":
            raise ValueError(
                f"{s.info.name}: experts that start from one draw cannot be exported; call plan.init_ instead"
            )
        row = _row(plan, s, (extra or {}).get(s.info.layout.pattern, 1.0))
        kinds.setdefault(row.pattern, {}).setdefault(row, []).append(s.info)
    return [
        # one setting for all its layers: the row holds in any, and the file is as short as the plan is uniform
        replace(row, layers=None if len(settled) == 1 else _layers(placed))
        for settled in kinds.values()
        for row, placed in settled.items()
    ]


def _row(plan: PlanData, s: TensorPlan, c: float) -> ExportRow:
    """One tensor's line; ``c`` is folded in beyond the plan's own fold, in both its values and its start."""
    v = s.values if c == 1 else folded_values(plan, s.info.role, s.values, c)
    assert v.lr is not None and v.weight_decay is not None and v.eps is not None
    layout = s.info.layout
    constant = None if s.constant is None else s.constant * c
    muon = of_tuned(plan.tuned, s.info.role) == "muon"
    return ExportRow(
        _pattern(s.info),
        None,
        " + ".join(layout.parts) or layout.role,
        v.lr,
        v.weight_decay,
        v.eps,
        v.init_std,
        constant,
        matrices_of(plan, s.info) if muon else None,
        s.info.fan_in if muon else 0,
    )


def _pattern(p: ParamInfo) -> str:
    """The row's pattern; where it has marked stars, that of one stage, whose first star is the layer."""
    stars = p.layout.stars
    if "{" not in p.layout.pattern:
        return p.layout.pattern
    return p.layout.starred(p.name, stars.index("layer") if "layer" in stars else 0)


def _layers(placed: Sequence[ParamInfo]) -> tuple[int, ...]:
    """The numbers that the names have for their layers: within a stage, where there are some."""
    numbers = {p.layout.number(p.name, "layer") for p in placed}
    return tuple(sorted(n for n in numbers if n is not None))


def left_alone(model: nn.Module) -> list[Layout]:
    """The rows of what a model's table says to leave alone."""
    return [row for row in layout_of(model) if row.role == UNPLANNED]


def refuse_trained_alone(model: nn.Module, stack: str) -> None:
    """``ValueError`` for a stack that has a group for every trained tensor, where the model trains some that are not planned."""
    if trained := trained_unplanned(model):
        raise ValueError(
            f"{trained[0]} is unplanned and trained, and {stack} would train it with settings of the plan: requires_grad_(False), or"
            ' export("torch") for a loop of your own'
        )
