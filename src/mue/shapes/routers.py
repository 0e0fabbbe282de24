"""What numbers and checks need to know of a router, without its code: the router table.

A router is one file: a class in ``mue.moe.routers``, or in a module of yours, under the decorator
``mue.moe.routers.base.router``, whose keywords are the facts here. The two standard routers stand here themselves, so that
planning them needs no torch; any other name imports the file that registers it when it is first looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mue.shapes.losses import AUXILIARY_LOSSES
from mue.shapes.settings import Chosen, Setting
from mue.util.errors import nearest, positive
from mue.util.registry import Registry

SCORES = ("sigmoid", "softmax", None)
LOSSES = "losses"
"""The setting that every router has: coefficients of auxiliary losses by name."""
LOGIT_STD = "logit_std"
"""The setting of routers whose moments depend on how far apart their logits are at init; a plan says it (:mod:`mue.plan.gates`)."""
TOKEN_STD = "token_std"
"""Beside it, of routers that compare tokens: how far apart an expert's logits of different tokens are; as far, where nobody says less."""
MOMENTS_BY_LOGITS = {
    LOGIT_STD: Setting(
        default=None,
        kind=float,
        low=0.0,
        meaning="std of a token's logits at init, for which the moments are; a plan knows it",
    )
}


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """The facts of one router. Symbols: N experts, a active ones of each token, g groups.

    Attributes:
        name: as a shape's ``router`` has it.
        unit_sum: whether the weights sum to one over the active experts, which is what the rule's R = a assumes
            (docs/why/index.md#gates): True always, False never, None where the shape's ``normalize`` says so; or the
            name of the setting that does.
        even: every active expert has the weight 1/a, which sums to one.
        score: "sigmoid" or "softmax" where the weights are in proportion to that function of the router's logits (what a check
            can then compare); else None.
        matrix: has the (N, width) matrix of role ``router``, trained like any other.
        scalars: names of the trained scalars that it has beside it, of role ``norm`` (a temperature, a gain) and in ``layout()`` each.
        balance_bias: has the (N,) bias of role ``router_bias``, moved by load and not by the optimizer.
        needs_tokens: reads token ids, so that only a model of tokens can have it.
        stochastic: draws anew in every training step, so that two forward passes over one batch may differ.
        stackable: models with it can be trained several at once. Not where routers share trained parameters.
        pooled: its experts lie in one pool that all layers of a block read, where the shape says no number of ``pools``.
        owned: in the end each expert of a pool is one layer's, equally many of them each layer's.
        active: the only a that it knows; None where a is free.
        grouped: can choose a/g from each of g groups.
        any_active: a trained model of it may be evaluated with another number of active experts
            (:meth:`mue.moe.routers.base.BaseRouter.set_active`).
        unnormalised: what is said where its weights are planned not to sum to one.
        settings: what of it can be set, by name (``[target.router]`` of a plan file, ``router_settings`` of a block).
        losses: auxiliary losses that it is trained with, by name (``mue.moe.losses``), and their coefficients: defaults of the setting
            ``losses``.
        fits: called with (a, N, settings) for what no setting can say by itself; raises ``ValueError``.
        fits_batch: called with (a, N, settings, tokens) for a training step of so many tokens that it could not route; raises
            ``ValueError``.
        fits_sequence: the same of the tokens of one sequence, whatever the step.
        moments: called with (a, N, settings): E[Σw] and E[Σw²] over tokens at init, R divided out; None where they have to be
            measured. Those of raw scores are other ones for other stds of the logits: with :data:`MOMENTS_BY_LOGITS` among its
            settings a router is told.
        mean_active: called with (a, N, settings): the mean number of active experts at init, where that differs by token; None
            where it is a.
        revision: how often what it computes from the same numbers was changed; part of the keys of runs with it, which were other runs before.
        defined_in: the module and name that registered it.
    """

    name: str
    unit_sum: bool | str | None = None
    even: bool = False
    score: str | None = None
    matrix: bool = False
    scalars: tuple[str, ...] = ()
    balance_bias: bool = False
    needs_tokens: bool = False
    stochastic: bool = False
    stackable: bool = True
    pooled: bool = False
    owned: bool = False
    active: int | None = None
    grouped: bool = True
    any_active: bool = False
    unnormalised: str = 'gates that do not sum to one need gates = "measured" with gate_moments (mue plan FILE --measure-gates writes them)'
    settings: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    losses: Mapping[str, float] = field(default_factory=dict, hash=False)
    fits: Callable[[int, int, Mapping[str, Any]], None] | None = None
    fits_batch: Callable[[int, int, Mapping[str, Any], int], None] | None = None
    fits_sequence: Callable[[int, int, Mapping[str, Any], int], None] | None = None
    moments: Callable[[int, int, Mapping[str, Any]], tuple[float, float]] | None = None
    mean_active: Callable[[int, int, Mapping[str, Any]], float] | None = None
    revision: int = 0
    defined_in: str = field(default=__name__, compare=False)  # for messages of the registry: no fact of the router

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"router {self.name}: score must be one of {SCORES}, got {self.score!r}")
        if LOSSES in self.settings:
            raise ValueError(
                f"router {self.name}: every router has a setting {LOSSES}; give its defaults as losses={{}}"
            )
        if isinstance(self.unit_sum, str) and self.unit_sum not in self.settings:
            raise ValueError(f"router {self.name}: unit_sum = {self.unit_sum!r} is none of its settings")
        if self.even:
            object.__setattr__(self, "unit_sum", True)

    def sums_to_one(self, normalize: bool, settings: Mapping[str, Any]) -> bool:
        """Whether the weights sum to one for every token.

        Args:
            normalize: of the shape. settings: of the router, those that were chosen or all.
        """
        if self.unit_sum is None:
            return normalize
        return bool(self.complete(settings)[self.unit_sum]) if isinstance(self.unit_sum, str) else self.unit_sum

    def check(self, active: int, experts: int, groups: int, normalize: bool, settings: Mapping[str, Any]) -> None:
        """Refuse the numbers that this router cannot have.

        Args:
            active, experts, groups, normalize: a, N and g of the shape. settings: complete.

        Raises:
            ValueError: names the number and what it has to be.
        """
        if self.active is not None and active != self.active:
            raise ValueError(f"the {self.name} router uses {self.active} of the experts per token, got {active} active")
        if groups > 1 and not self.grouped:
            raise ValueError(f"the {self.name} router knows no groups, got {groups}: leave them out")
        if self.unit_sum is not None and not normalize:
            raise ValueError(f"the {self.name} router has nothing to normalise: leave normalize = false out")
        if self.fits is not None:
            self.fits(active, experts, settings)

    def chosen(self, given: Any) -> Chosen:
        """What of a router's settings differs from the defaults: all of it that files and hashes have.

        Args:
            given: a mapping of some of them, as a user wrote it.

        Raises:
            ValueError: an unknown setting, with the nearest name; a value of another kind or out of its range.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"settings of the {self.name} router must be a table, got {given!r}")
        own: dict[str, Any] = {}
        for name, value in given.items():
            if name == LOSSES:
                if losses := self._losses(value):
                    own[LOSSES] = losses
                continue
            if name not in self.settings:
                known = (*self.settings, LOSSES)
                raise ValueError(f"the {self.name} router has no setting {name!r}{nearest(str(name), known)}")
            checked = self.settings[name].checked(f"{name} of the {self.name} router", value)
            if checked != self.settings[name].default:
                own[name] = checked
        return Chosen(own)

    def complete(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting by name, defaults where nothing else was chosen, ``losses`` included."""
        values = {name: chosen.get(name, setting.default) for name, setting in self.settings.items()}
        return {**values, LOSSES: {**self.losses, **chosen.get(LOSSES, {})}}

    def _losses(self, given: Any) -> Chosen:
        """The coefficients in which a table of losses differs from the router's own."""
        where = f"{LOSSES} of the {self.name} router"
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must be a table of coefficients, as in {{ entropy = 1e-3 }}, got {given!r}")
        checked = {name: positive(f"{name} among {where}", value, zero=True) for name, value in given.items()}
        if checked and self.even:
            raise ValueError(f"the {self.name} router has no scores that a loss could train: leave {LOSSES} out")
        for name in checked:
            AUXILIARY_LOSSES.lookup(name)  # a wrong name is told here, and not when a model is built
        return Chosen({name: value for name, value in checked.items() if value != self.losses.get(name, 0.0)})


ROUTERS: Registry[RouterKind] = Registry("router", home="mue.moe.routers")
_SOFTMAX_UNNORMALISED = (
    "a softmax over all experts that is not renormalised over the active ones sums to about a/N, not 1, and"
    ' breaks the rule: set normalize = true, or gates = "measured" with gate_moments (mue plan FILE --measure-gates writes them)'
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
