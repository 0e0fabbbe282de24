"""One kind of block in numbers: a dense feed-forward, or experts in the notation ``128e8a4g1s``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mue.shapes.routers import ROUTERS, RouterKind
from mue.shapes.settings import NO_SETTINGS
from mue.util.errors import LARGEST, explain_calls, positive, positive_int, true_or_false

# The two values of ``gates``: weights that sum to one over the active experts, or whatever gate_moments says of them.
NORMALISED = "unit-sum"
MEASURED = "measured"
# What is walked one by one, layer for layer and expert for expert: far above any model, and well below what fills a memory.
MOST_LAYERS = 100_000
MOST_EXPERTS = 10_000_000


@explain_calls
@dataclass(frozen=True, kw_only=True)
class Block:
    """``layers`` equal blocks: a dense feed-forward of width ``ffn``, or experts.

    Attributes:
        layers: how many consecutive blocks look like this.
        ffn: hidden width of a dense feed-forward; None for experts.
        expert: hidden width h of one routed expert.
        experts, active, groups: N routed experts, a of them per token, a/g from each of g groups.
        shared_experts, shared: number and width of the always-on experts (width: ``expert`` unless given).
        pools: sets of N routed experts in these layers, each read by layers/pools consecutive ones (UniPool, 2605.06665). 0: the
            router's kind says so, which for all but UniPool's means that every layer has its own.
        router: a name in :data:`mue.shapes.routers.ROUTERS`: ``"sigmoid"`` or ``"softmax"`` scores, ``"hash"``, ``"random"``,
            ``"thor"``, or one of yours.
        normalize: the weights sum to one over the active experts. The rule needs it, or ``gates="measured"``.
        gates: ``"unit-sum"`` or ``"measured"``; the latter with ``gate_moments`` = (E[Σw], E[Σw²]) over tokens at
            init, coefficient scale included.
        router_settings: settings of its router (:attr:`mue.shapes.routers.RouterKind.settings`), of which those are kept that
            differ from the defaults.
    """

    layers: int
    ffn: int | None = None
    expert: int | None = None
    experts: int = 0
    active: int = 0
    groups: int = 1
    shared_experts: int = 0
    shared: int | None = None
    router: str = "sigmoid"
    normalize: bool = True
    gates: str = NORMALISED
    gate_moments: tuple[float, float] | None = None
    router_settings: Mapping[str, Any] = NO_SETTINGS
    pools: int = 0

    def __post_init__(self) -> None:
        self._whole("layers", most=MOST_LAYERS)
        if self.ffn is not None:
            self._whole("ffn")
            for f in fields(self):  # nothing that only experts read may stand beside ffn and be ignored
                if f.name not in ("layers", "ffn") and getattr(self, f.name) != f.default:
                    raise ValueError(f"a block is dense (ffn) or a MoE (moe, expert), not both: ffn beside {f.name}")
            return
        self._check_experts()
        self._check_gates()

    def _check_experts(self) -> None:
        """N, a, g and the shared experts as numbers that a block can have.

        Groups are equal, and so are their shares of a.
        """
        self._whole("groups", most=MOST_EXPERTS)
        if self.expert is None:
            raise ValueError("a block needs ffn (dense) or moe and expert (experts and the width of one)")
        self._whole("expert")
        if self.shared_experts:
            self._whole("shared_experts", most=MOST_EXPERTS)
        if self.shared is not None:
            self._whole("shared")
            if not self.shared_experts:
                raise ValueError(
                    f"shared = {self.shared} is the width of shared experts, but there are none: add e.g. 1s"
                )
        # A hybrid of shared experts alone has the dense rule's values
        if self.experts == 0 and self.active == 0 and self.shared_experts > 0:
            if self.pools:
                raise ValueError(f"pools = {self.pools}, but there are no routed experts to lie in them: leave it out")
            return  # shared experts only: a dense feed-forward by another name
        self._whole("experts", most=MOST_EXPERTS)
        self._whole("active", most=MOST_EXPERTS)
        N, a, g = self.experts, self.active, self.groups
        if a > N:
            raise ValueError(f"{a} active of {N} experts: a token cannot use more experts than there are")
        if N % g or a % g:
            raise ValueError(f"{g} groups must divide both the {N} experts and the {a} active ones")
        self._check_pools()

    def _check_pools(self) -> None:
        """Every pool is read by as many layers as any other."""
        if not self.pools and self.router_kind.pooled:
            object.__setattr__(self, "pools", 1)
        if not self.pools:
            return
        self._whole("pools", most=MOST_LAYERS)
        if self.pools > self.layers:
            raise ValueError(
                f"{self.pools} pools of experts for {self.layers} layers: no layer would read some of them; use at most"
                f" {self.layers}"
            )
        if self.layers % self.pools:
            raise ValueError(
                f"{self.pools} pools do not divide the {self.layers} layers, and each is read by equally many: use a number"
                f" that divides {self.layers}"
            )
        if self.router_kind.owned and (self.experts % self.readers or self.experts < self.active * self.readers):
            raise ValueError(
                f"the {self.router} router gives each of {self.readers} layers an equal part of the {self.experts} experts, and a"
                f" token uses {self.active} of that: use a multiple of {self.readers}, at least {self.active * self.readers}"
            )

    def _whole(self, name: str, most: int = LARGEST) -> None:
        """One of the numbers as a plain ``int``, or refused."""
        object.__setattr__(self, name, positive_int(name, getattr(self, name), most))

    def _check_gates(self) -> None:
        """Gates that sum to one, or moments that say what they do: else R = a is wrong (docs/why/index.md#gates)."""
        true_or_false("normalize", self.normalize)
        kind = self.router_kind
        object.__setattr__(self, "router_settings", kind.chosen(self.router_settings))
        if self.experts:
            kind.check(self.active, self.experts, self.groups, self.normalize, self.all_settings)
        elif self.router_settings:
            raise ValueError(
                f"settings of the {kind.name} router need routed experts; shared ones alone have no router"
            )
        if self.gates not in (NORMALISED, MEASURED):
            raise ValueError(f"gates must be {NORMALISED!r} or {MEASURED!r}, got {self.gates!r}")
        if self.gates == NORMALISED:
            if not kind.sums_to_one(self.normalize, self.router_settings) and kind.moments is None:
                raise ValueError(kind.unnormalised)
            if self.gate_moments is not None:
                raise ValueError('gate_moments are read only with gates = "measured"')
            return
        if not self.experts:
            raise ValueError('gates = "measured" needs routed experts; shared ones alone have no gate')
        if not isinstance(self.gate_moments, list | tuple) or len(self.gate_moments) != 2:
            raise ValueError(
                'gates = "measured" needs gate_moments = [E[Σw], E[Σw²]], measured over tokens at init'
                " (mue plan FILE --measure-gates writes them)"
            )
        m1, m2 = (positive("gate_moments", m) for m in self.gate_moments)
        object.__setattr__(self, "gate_moments", (m1, m2))
        # Cauchy–Schwarz over the a active weights: Σw² ≥ (Σw)²/a, with equality where all are even; 1e-9 for rounding.
        # Where a differs by token, no more than N are active.
        most, symbol = (self.active, "a") if kind.mean_active is None else (self.experts, "N")
        if not m1 * m1 / most * (1 - 1e-9) <= m2:
            raise ValueError(
                f"gate_moments ({m1:g}, {m2:g}): E[Σw²] cannot be below E[Σw]²/{symbol} = {m1 * m1 / most:g}"
            )

    @property
    def router_kind(self) -> RouterKind:
        """The facts of its router; ``ValueError`` with the nearest name for an unknown one."""
        return ROUTERS.lookup(self.router)

    @property
    def all_settings(self) -> dict[str, Any]:
        """Every setting of its router, defaults included."""
        return self.router_kind.complete(self.router_settings)

    @property
    def moments(self) -> tuple[float, float] | None:
        """(E[Σw], E[Σw²]) over tokens at init, R divided out: as measured, else as its router knows them; None for unit-sum gates."""
        kind = self.router_kind
        if self.gate_moments is not None or kind.moments is None or not self.experts:
            return self.gate_moments
        return kind.moments(self.active, self.experts, self.all_settings)

    @property
    def exact_sum(self) -> bool:
        """Whether the weights of every token sum to one before R, in training too: its router's promise, where nothing else was
        measured. How many experts a token has may differ all the same (dtop-p)."""
        other = self.gate_moments is not None and self.gate_moments[0] != 1.0
        return self.experts > 0 and not other and self.router_kind.sums_to_one(self.normalize, self.router_settings)

    @property
    def is_moe(self) -> bool:
        """Whether the block has experts."""
        return self.ffn is None

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together, n_s·h_s."""
        return self.shared_experts * (self.shared or self.expert or 0)

    @property
    def routed_width(self) -> int:
        """Width of the active routed experts together, a·h."""
        return self.active * (self.expert or 0)

    @property
    def active_width(self) -> int:
        """H_act: the sum of the down-projection fan-ins that one token passes through."""
        return self.ffn if self.ffn is not None else self.routed_width + self.shared_width

    @property
    def fan_in(self) -> int:
        """Fan-in of one down projection: H, or h."""
        return self.ffn if self.ffn is not None else self.expert or 0

    @property
    def readers(self) -> int:
        """Layers that read one set of routed experts: 1 but for pools."""
        return self.layers // self.pools if self.pools else 1

    @property
    def share(self) -> float:
        """Share of the tokens that one routed expert sees: a/N, times the layers that read it; 1 where every token passes."""
        return self.readers * self.active / self.experts if self.experts else 1.0

    @property
    def gate_variance(self) -> float:
        """F = a·E[Σw²]/E[Σw]²: 1 for uniform weights, a for one-hot ones (docs/why/index.md#gates)."""
        if self.moments is None:
            return 1.0
        m1, m2 = self.moments
        return self.active * m2 / m1**2

    @property
    def kappa(self) -> float:
        """(F·a·h + n_s·h_s)/H_act: init variance of the branch against uniform weights; 1 for normalised gates."""
        if self.moments is None:
            return 1.0
        return (self.gate_variance * self.routed_width + self.shared_width) / self.active_width

    @property
    def route_scale(self) -> float:
        """R of the rule: a on the normalised routed sum (ā/m1 where the gates are measured); 1 without a router.

        Where it meets A and the residual multiplier is told at ``mue.plan.values.Multipliers``.
        """
        if not self.experts:
            return 1.0
        return self.active / (self.moments[0] if self.moments else 1.0)

    @property
    def notation(self) -> str:
        """``"128e8a4g1s"``, with pools ``"96e1a1p"``, or ``"dense"``."""
        if not self.is_moe:
            return "dense"
        parts = f"{self.experts}e{self.active}a" if self.experts else ""
        return (
            parts
            + (f"{self.groups}g" if self.groups > 1 else "")
            + (f"{self.shared_experts}s" if self.shared_experts else "")
            + (f"{self.pools}p" if self.pools else "")
        )


def parse_notation(notation: str) -> dict[str, int]:
    """``"128e8a4g1s"`` → ``{"experts": 128, "active": 8, "groups": 4, "shared_experts": 1}``.

    Suffixes: e experts, a active, g groups, s shared, p pools; in any order, each at most once. ``ValueError`` otherwise.
    """
    names = {"e": "experts", "a": "active", "g": "groups", "s": "shared_experts", "p": "pools"}
    found: dict[str, int] = {}
    if not isinstance(notation, str) or not re.fullmatch(r"(\d+[a-z])+", notation):
        raise ValueError(
            f"cannot read {notation!r} as a MoE; write it like 128e8a4g1s (experts, active, groups, shared)"
        )
    for number, letter in re.findall(r"(\d+)([a-z])", notation):
        if letter not in names:
            raise ValueError(
                f"unknown suffix {letter!r} in {notation!r}: use e (experts), a (active), g (groups), s (shared), p (pools)"
            )
        if names[letter] in found:
            raise ValueError(f"suffix {letter!r} appears twice in {notation!r}")
        if int(number) == 0:
            raise ValueError(f"0{letter} in {notation!r}: leave the suffix out, or give at least 1")
        found[names[letter]] = int(number)
    if ("experts" in found) != ("active" in found) or not ("experts" in found or "shared_experts" in found):
        raise ValueError(f"{notation!r} needs both e (experts) and a (active per token), as in 8e2a")
    return found
