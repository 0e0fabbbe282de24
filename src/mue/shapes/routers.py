"""What numbers and checks need to know of a router, without its code: the router table.

A router is one file: a class in ``mue.moe.routers``, or in a module of yours, under the decorator
``mue.moe.routers.base.router``, whose keywords are the facts here. The two standard routers stand here themselves, so that
planning them needs no torch; any other name imports the file that registers it when it is first looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mue.util.registry import Registry

SCORES = ("sigmoid", "softmax", None)


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """The facts of one router. Symbols: N experts, a active ones of each token, g groups.

    Attributes:
        name: as a shape's ``router`` has it.
        unit_sum: whether the weights sum to one over the active experts, which is what the rule's R = a assumes
            (conventions.md 9): True always, False never, None where the shape's ``normalize`` says so.
        even: every active expert has the weight 1/a, which sums to one.
        score: "sigmoid" or "softmax" where the weights are in proportion to that function of the router's logits (what a check
            can then compare); else None.
        matrix: has the (N, width) matrix of role ``router``, trained like any other.
        balance_bias: has the (N,) bias of role ``router_bias``, moved by load and not by the optimizer.
        needs_tokens: reads token ids, so that only a model of tokens can have it.
        stochastic: draws anew in every training step, so that two forward passes over one batch may differ.
        active: the only a that it knows; None where a is free.
        grouped: can choose a/g from each of g groups.
        any_active: a trained model of it may be evaluated with another number of active experts
            (:meth:`mue.moe.routers.base.BaseRouter.set_active`).
        unnormalised: what is said where its weights are planned not to sum to one.
        defined_in: the module and name that registered it.
    """

    name: str
    unit_sum: bool | None = None
    even: bool = False
    score: str | None = None
    matrix: bool = False
    balance_bias: bool = False
    needs_tokens: bool = False
    stochastic: bool = False
    active: int | None = None
    grouped: bool = True
    any_active: bool = False
    unnormalised: str = 'gates that do not sum to one need gates = "measured" with gate_moments'
    defined_in: str = field(default=__name__, compare=False)  # for messages of the registry: no fact of the router

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"router {self.name}: score must be one of {SCORES}, got {self.score!r}")
        if self.even:
            object.__setattr__(self, "unit_sum", True)

    def sums_to_one(self, normalize: bool) -> bool:
        """Whether the weights sum to one, given the shape's ``normalize``."""
        return normalize if self.unit_sum is None else self.unit_sum

    def check(self, active: int, groups: int, normalize: bool) -> None:
        """Refuse the numbers that this router cannot have.

        Raises:
            ValueError: names the number and what it has to be.
        """
        if self.active is not None and active != self.active:
            raise ValueError(f"the {self.name} router uses {self.active} of the experts per token, got {active} active")
        if groups > 1 and not self.grouped:
            raise ValueError(f"the {self.name} router knows no groups, got {groups}: leave them out")
        if self.unit_sum is not None and not normalize:
            raise ValueError(f"the {self.name} router has nothing to normalise: leave normalize = false out")


ROUTERS: Registry[RouterKind] = Registry("router", home="mue.moe.routers")
_SOFTMAX_UNNORMALISED = (
    "a softmax over all experts that is not renormalised over the active ones sums to about a/N, not 1, and"
    ' breaks the rule: set normalize = true, or gates = "measured" with gate_moments'
)
ROUTERS.register("sigmoid", place=0)(
    RouterKind(name="sigmoid", score="sigmoid", matrix=True, balance_bias=True, any_active=True)
)
ROUTERS.register("softmax", place=1)(
    RouterKind(
        name="softmax",
        score="softmax",
        matrix=True,
        balance_bias=True,
        any_active=True,
        unnormalised=_SOFTMAX_UNNORMALISED,
    )
)
