"""A stock model with a plan's multipliers in its forward pass, as a user would write it: the same code, wrapped and declared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.checks.branches import fit_ratio
from mue.layouts.layout import Layout, ParamInfo
from mue.layouts.of_model import layout_of, placed
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.stock import observe_stock
from mue.rules.roles import ROLES
from support.wiring.families import Stock, tokens_of


@dataclass
class Knob:
    """What one module's output is multiplied by; faults turn it.

    Attributes:
        kind: of the role that writes there, ``"after"`` for the norm that ends a branch, or ``"head"``. layer: None for the head.
        factors: by name (``A``, ``R``, ``residual``, ``head``).
    """

    kind: str
    layer: int | None
    factors: dict[str, float] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        factor = prod(self.factors.values())
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


class Carried(nn.Module):
    """``stock`` with the multipliers of ``plan``: hooks on its modules, and a layout of its own."""

    def __init__(self, stock: nn.Module, family: Stock) -> None:
        super().__init__()
        self.stock = stock
        params = placed(stock)
        self._rows = [
            replace(r, pattern=f"stock.{r.pattern}", after=tuple(f"stock.{a}" for a in r.after))
            for r in layout_of(stock)
        ]
        self.knobs: list[Knob] = []
        self._scale(family.plan)
        self._knob(stock.get_input_embeddings(), "embedding", None, own=1 / own_embedding(stock))
        self._scale_queries(family, params)
        for p in params:
            self._carry(p, params, family)
        head = next((p for p in params if p.role == "head"), None)
        self._knob(
            stock.get_output_embeddings() if head is None else owner(stock, head),
            "head",
            None,
            head=family.plan.head_multiplier,
        )

    def layout(self) -> Sequence[Layout]:
        return self._rows

    def forward(self, **batch: Tensor) -> Any:
        return self.stock(**batch)

    def _scale(self, plan: mue.Plan) -> None:
        """The planned attention scale, where the code has a number for it; elsewhere the plan has the code's own."""
        # rotations that stretch the context (YaRN) multiply q and k by a number of their own
        rotary = {getattr(m, "attention_scaling", 1.0) for m in self.stock.modules()} - {1.0}
        for module in self.stock.modules():
            if isinstance(getattr(module, "scaling", None), float):
                module.scaling = plan.attention_scale / max(rotary, default=1.0) ** 2

    def _scale_queries(self, family: Stock, params: list[ParamInfo]) -> None:
        """The planned attention scale, where the code has no number for it: by the queries, as far as it is another."""
        if any(isinstance(getattr(m, "scaling", None), float) for m in self.stock.modules()):
            return
        own = family_of(self.stock.config.model_type).attention_scale or family.plan.target.head_dim**-0.5
        c = family.plan.attention_scale / own
        for p in params if abs(c - 1) > 1e-9 else ():
            if p.role == "attention_q":
                self._knob(owner(self.stock, p), "query", None, own=c)

    def _carry(self, p: ParamInfo, params: list[ParamInfo], family: Stock) -> None:
        if p.layer is None or not (p.layout.after or ROLES[p.role].writes_residual):
            return
        m, ended = family.plan.multipliers, any(p.layout.pattern in other.layout.after for other in params)
        residual = {} if ended else {"residual": m.residual}
        kind, where = ROLES[p.role].kind, owner(self.stock, p)
        if p.layout.after:
            kind, residual = "after", {"residual": m.residual}
        elif kind != "attention":
            residual["A"] = m.output[p.layer]
        if kind == "expert":
            residual["R"], where = m.route[p.layer], self.stock.get_submodule(family.experts[p.layer])
        self._knob(where, kind, p.layer, **residual)

    def _knob(self, module: nn.Module, kind: str, layer: int | None, **factors: float) -> None:
        knob = Knob(kind, layer, factors)
        if module.__dict__.get("_knobbed"):  # several tensors of one module (experts apart, factors of one projection)
            return
        module.__dict__["_knobbed"] = True
        module.register_forward_hook(knob)
        self.knobs.append(knob)


def owner(model: nn.Module, p: ParamInfo) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(p.name.rpartition(".")[0])


@torch.no_grad()
def own_embedding(stock: nn.Module) -> float:
    """The number that the family's own code multiplies its embedding by (Gemma's √width); 1 where it adds something to it."""
    tokens = tokens_of(0)
    table = stock.get_input_embeddings()
    rows, seen = table.weight[tokens], stock.eval()(input_ids=tokens, output_hidden_states=True).hidden_states
    for found in (*(seen or ())[:1], table(tokens)):  # in the model's code, or in the table's own
        c, residue = fit_ratio(found, rows) if found.shape == rows.shape else (1.0, 1.0)
        if residue < 1e-3 and abs(c - 1) > 1e-3:
            return c
    return 1.0


def cancelled(model: nn.Module) -> bool:
    """Whether a projection's scale is cancelled with no gain in its place: no residual multiplier can be carried there."""
    return bool(observe_stock(model).description.cancelled)
