"""The pieces a plan is made of: values of a role, of a block, of the forward pass. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mue.rules.table import FIELDS, NORMAL
from mue.util.errors import explain_calls


@dataclass(frozen=True)
class Values:
    """One role's numbers, or the factors on them. None: it has no such thing (a gain has no init std), or blocks differ in it."""

    init_std: float | None
    lr: float | None
    weight_decay: float | None
    eps: float | None

    def items(self) -> list[tuple[str, float | None]]:
        return [(name, getattr(self, name)) for name in FIELDS]


# A role that the rule has no row for; a target that has it was refused already.
NOTHING = Values(None, None, None, None)


@dataclass(frozen=True)
class RolePlan:
    """One role of a plan.

    Attributes:
        values: absolute, as the target is trained with them. factor: on the base's values. formula: number → the monomial
            that the factor is, as text.
        count: tensors of this role in the whole model, experts one by one; 0 where it has none.
        source: paper, table or equation. status: the mark of the weakest number. marks: number → its own mark.
        init: ``"normal"``, ``"zero"``, ``"shared"`` (all experts start from one draw) or ``"constant"``.
        constant: what the last starts at: a gain at 1, a bias at 0, a folded final norm at its coefficient.
    """

    values: Values
    factor: Values
    formula: Mapping[str, str]
    count: int
    source: str
    status: str
    init: str = NORMAL
    constant: float | None = None
    marks: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            **dict(self.values.items()),
            "factor": dict(self.factor.items()),
            "formula": dict(self.formula),
            "count": self.count,
            "source": self.source,
            "status": self.status,
            "marks": dict(self.marks),
            "init": self.init,
            "constant": self.constant,
        }


@dataclass(frozen=True)
class BlockPlan:
    """What holds in ``layers`` equal blocks.

    Attributes:
        notation: ``"dense"`` or e.g. ``"128e8a1s"``. active_width: H_act. output_multiplier: A. route_scale: R.
        drift: what the change moves and nothing corrects (docs/why/limits.md#drift), None where nobody derived it.
        roles: all of them by name; those that the block does not hold have count 0.
    """

    layers: int
    notation: str
    active_width: int
    output_multiplier: float
    route_scale: float
    drift: Mapping[str, float | None]
    roles: Mapping[str, RolePlan]

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "roles"}
        return {**out, "drift": dict(self.drift), "roles": {r: p.to_dict() for r, p in self.roles.items()}}


@explain_calls
@dataclass(frozen=True)
class Multipliers:
    """Forward multipliers of a model; the default is a stock model.

    The feed-forward branch of a block adds to the residual stream (2605.23893; docs/why/index.md#experts)

        y = l^-α · A · ( R · Σ π_i E_i(x) + Σ S_k(x) ),    Σ π_i = 1

    with π_i the gates of the active experts E_i, and S_k the shared experts; a dense block has one S and no E. Its three
    numbers come from three places and meet here:

    * R, ``Block.route_scale``: a fact of the target's block, a for gates that sum to one, ā/m1 for measured ones. Absolute.
    * A, ``BlockPlan.output_multiplier``: A* of the base times the rule's factor 1/ρ_e (:mod:`mue.plan.blocks`). One for all
      experts of a block, routed and shared.
    * l^-α, ``PlanData.residual_multiplier``: on this branch and on attention's, the same in every block.

    A model in multiplier form multiplies by all three: R in the router's weights, A in the branch (``mue.moe.MoELayer``), l^-α
    where the branch meets the stream. :func:`mue.plan.fold.fold` puts
    l^-α·A·R into the routed down projections, l^-α·A into the dense and shared ones, l^-α into attention's o, and leaves 1
    here; R can stay for an engine that has a routed scaling factor of its own.

    Attributes:
        residual: l^-α. head: on the logits. attention_scale: on q·k (None: 1/√head_dim).
        output: A of every layer. route: R of every layer. Empty: 1.
    """

    residual: float = 1.0
    head: float = 1.0
    attention_scale: float | None = None
    output: tuple[float, ...] = ()
    route: tuple[float, ...] = ()


@dataclass(frozen=True)
class Folding:
    """How a plan was folded: ``route`` is ``"weights"`` or ``"model"`` (who carries R), and c by block and role.

    Roles that are not named have c = 1.
    """

    route: str
    coefficients: tuple[Mapping[str, float], ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {"route": self.route, "coefficients": [dict(c) for c in self.coefficients]}
