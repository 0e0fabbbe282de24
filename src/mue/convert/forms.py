"""From one form of a plan to the other, tensor by tensor: what a checkpoint's numbers become, by parameter name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mue.convert.live import rescale_state, rescale_weight
from mue.layouts.layout import HasLayout, canonical, unwrap
from mue.layouts.of_model import placement_of
from mue.model.apply import grouped
from mue.model.coefficients import TensorFold, tensor_folds_of
from mue.model.match import match_sizes
from mue.model.stock import query_coefficients, stock_faults
from mue.model.tensor_plan import tensor_plans_of
from mue.plan.fold import fold, state_powers, unfold
from mue.plan.plan import HASH_KEYS, PlanData
from mue.rules.roles import ROLES

FORMS = ("folded", "multipliers")


@dataclass(frozen=True)
class TensorChange:
    """What one parameter becomes: ``(w + offset)·ratio - offset``; its optimizer state s becomes ``s·ratio^powers[s]``."""

    ratio: float
    offset: float
    powers: Mapping[str, int]

    def weight(self, name: str, value: Tensor) -> Tensor:
        """The parameter in the other form.

        Raises:
            ValueError: a kind of number that cannot be multiplied (quantised weights), or one too small to hold the result.
        """
        if self.ratio == 1:
            return value
        # 8-bit floats have scales beside them, tensors of their own, which would have to take c instead
        if not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(
                f"{name} is {value.dtype}, and {self.ratio:g} cannot be folded into it: dequantise it first"
            )
        new = rescale_weight(value, self.ratio, self.offset)
        if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} times {self.ratio:g} is more than {value.dtype} holds: convert it in float32")
        return new

    def state(self, name: str, key: str, value: Any) -> Any:
        """One entry of the parameter's optimizer state in the other form; ``ValueError`` for one that is not known."""
        return value if self.ratio == 1 else rescale_state(name, key, value, self.ratio, self.powers)


@dataclass(frozen=True)
class Group:
    """An optimizer group of one form: names of its parameters, and the settings that the plan gives them."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Conversion:
    """One plan's way from form to form.

    Attributes:
        source, target: the plan in either form. form: of the target, from :data:`FORMS`.
        changes: canonical parameter name → its change. second: other names of tied parameters → the first.
        buffers: names that travel as they are. shapes: of the parameters.
        before, after: optimizer groups as ``param_groups`` makes them, in order.
    """

    source: PlanData
    target: PlanData
    form: str
    changes: Mapping[str, TensorChange]
    second: Mapping[str, str]
    buffers: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    before: tuple[Group, ...]
    after: tuple[Group, ...]

    def first(self, name: str) -> str:
        """The name under which a parameter is known here, whatever wraps the model and ties the parameter."""
        name = canonical(name)
        return self.second.get(name, name)

    def knows(self, name: str) -> bool:
        return self.first(name) in self.changes

    def change(self, name: str) -> TensorChange | None:
        """What becomes of a name, None for a buffer; ``ValueError`` for one the model does not have."""
        name = self.first(name)
        if name in self.changes:
            return self.changes[name]
        if name in self.buffers:
            return None
        raise ValueError(f"{name} is in the checkpoint and not in the planned model {self.target.target.name}")

    def check_mark(self, where: str, data: Mapping[str, Any]) -> None:
        """``ValueError`` where a checkpoint says that it has this form already, or belongs to another plan."""
        for found in _hashes(data):
            if found == self.target.hash:
                raise ValueError(f"{where} is in the {self.form} form already: converting twice would scale it twice")
            if found != self.source.hash:
                raise ValueError(
                    f"{where} belongs to plan {found}; this is plan {self.source.hash}"
                    f" ({self.target.hash} in the {self.form} form): give the plan it was made with"
                )

    def marked(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``data`` with the new form's plan wherever the old one's was, and the form under ``mue``."""
        own = data.get("mue", {})
        mark = {"plan": self.target.hash, "form": self.form}
        if isinstance(own, str):
            new: Any = json.dumps({**json.loads(own or "{}"), **mark})
        else:
            new = {**own, **mark}
        moved = {k: self.target.hash for k in HASH_KEYS if data.get(k) == self.source.hash}
        return {**data, **moved, "mue": new}


def conversion(plan: PlanData, form: str, model: nn.Module, route: str = "weights") -> Conversion:
    """How a checkpoint of ``model`` gets into ``form``.

    Args:
        plan: in either form; a folded one brings its own route. form: from :data:`FORMS`.
        model: the planned model, on the meta device or not; a stock model with the config it has when folded.
        route: who carries R when folded (:func:`mue.fold.fold`).

    Raises:
        ValueError: an unknown form or route; a model of other sizes than planned.
    """
    if form not in FORMS:
        raise ValueError(f"a checkpoint can become {' or '.join(FORMS)}, not {form!r}")
    multiplied = unfold(plan)
    folded = plan if plan.folding is not None else fold(plan, route)
    # sizes alone: which form the weights are in is what the checkpoint's mark says
    placed = match_sizes(multiplied, model)
    queries: Mapping[str, float] = {}
    if not isinstance(unwrap(model), HasLayout):
        if faults := stock_faults(folded, model):
            raise ValueError(f"this model cannot run plan {folded.hash} when folded:\n  " + "\n  ".join(faults))
        queries = query_coefficients(folded, model, placed)
    # what queries carry for the sake of the attention scale is in the folded form alone: the other one has a setting
    sides = {
        "folded": (folded, tensor_folds_of(folded, placed, queries)),
        "multipliers": (multiplied, tensor_folds_of(multiplied, placed, {})),
    }
    target, there = sides.pop(form)
    ((source, here),) = sides.values()
    changes = {
        a.info.name: TensorChange(b.c / a.c, a.info.gain_offset, state_powers(target, a.info.role))
        for a, b in zip(here, there, strict=True)
    }
    unplanned = placement_of(model).unplanned  # which travel as they are, like buffers
    first = {id(p): canonical(n) for n, p in model.named_parameters()}
    every = {canonical(n): first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    names = {canonical(n) for n in model.state_dict()}
    return Conversion(
        source,
        target,
        form,
        changes,
        {n: f for n, f in every.items() if n != f},
        frozenset(names - set(every)) | {p.name for p in placed if not ROLES[p.role].trained} | set(unplanned),
        {p.name: tuple(p.parameter.shape) for p in placed},
        _groups(source, here),
        _groups(target, there),
    )


def _groups(plan: PlanData, folded: Sequence[TensorFold]) -> tuple[Group, ...]:
    return tuple(
        Group(tuple(p.name for p in g["params"]), {k: v for k, v in g.items() if k != "params"})
        for g in grouped(plan, tensor_plans_of(plan, folded))
    )


def _hashes(data: Mapping[str, Any]) -> list[str]:
    """Every plan hash a checkpoint names: its own keys, and inside ``mue`` (a mapping, or its text in JSON)."""
    own = data.get("mue")
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except json.JSONDecodeError:
            own = None
    inside = own if isinstance(own, Mapping) else {}
    found = [d.get(k) for d in (data, inside) for k in HASH_KEYS]
    # "plan" is a common key: only what looks like a hash of ours is one
    return [f for f in found if isinstance(f, str) and re.fullmatch("[0-9a-f]{16}", f)]
