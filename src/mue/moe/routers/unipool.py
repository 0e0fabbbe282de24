"""UniPool's router: normalised scores over a pool of experts that several layers read, balanced over all of them (2605.06665).

The pool itself is a matter of shapes (``Block.pools``) and of the model (``mue.moe.ExpertPool``).

Shape suffixes: T tokens, D width, N experts of the pool, K active experts per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.layouts.layout import Layout
from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.ops import select_top
from mue.moe.routing import Routing
from mue.shapes.settings import Setting

EPS = 1e-8  # beside the norm of a token's logits, as published
# A draw of logits counts for c0 if its largest is above this. 1/‖·‖ has no mean without such a bound: all logits are negative
# with probability 2^-N, and the largest lies near zero with a density of N·φ(0)·2^-(N-1). From 16 experts on it moves c0 by
# less than a thousandth.
SLIGHT = 0.1


def _fits(active: int, experts: int, settings: Mapping[str, Any]) -> None:
    if experts < 2:
        raise ValueError("the unipool router compares the experts of a pool: it needs at least 2 of them")


def _moments(active: int, experts: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    return norm_moments(active, experts)


def _mean_active(active: int, experts: int, settings: Mapping[str, Any]) -> float:
    """Of the a best those whose logit is positive: E[min(a, B)] with B of N heads of a coin."""
    return sum(1 - _fewer(n, experts, 0.5) for n in range(1, active + 1))


FACTS: dict[str, Any] = {
    "unit_sum": False,
    "matrix": True,
    "scalars": ("scale",),
    "pooled": True,
    "grouped": False,
    "settings": {
        "normalise_scores": Setting(
            default=False, meaning="the pool's balance loss reads scores divided by their sum, not raw ones"
        )
    },
    "losses": {"pool_balance": 1e-2},
    "fits": _fits,
    "moments": _moments,
    "mean_active": _mean_active,
}


@router("unipool", place=10, **FACTS)
class UniPoolRouter(MatrixRouter):
    """NormRouter: s = σ · c0 · ReLU(z / ‖z‖) of the logits z = W x; the a best experts, each with its own s as weight.

    Scores do not change with the size of z. σ is learnt, one for each layer; c0 (:func:`norm_constant`) makes the weights of a token
    about σ long at the start. They do not sum to one: R = a/m1 with m1 of :func:`norm_moments`. A token whose logits are all
    negative gets nothing from the experts, and the residual stream passes.

    `weight` (N, D) and `scale` (σ) are its parameters; `load` (N,) int64 counts pairs per expert in training mode since the last
    step. What all layers of a pool chose in the last step is in :class:`PoolLoad`, and the loss ``pool_balance`` reads it: a model
    has to call ``share``, or to leave that loss out.
    """

    load: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("load", torch.zeros(self.experts, dtype=torch.int64))
        self.constant = norm_constant(self.active, self.experts)

    @classmethod
    def shared(cls, routers: Sequence[UniPoolRouter]) -> PoolLoad:
        """The load of every pool."""
        return PoolLoad(routers)

    def layout(self) -> Sequence[Layout]:
        """Its matrix, and σ, which is trained like a gain: a rate of its own, no decay."""
        return [*super().layout(), Layout("scale", "norm", ("vector",), start=1.0)]

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens by their hidden states alone."""
        logit_TN = self.logits(x_TD)
        unit_TN = logit_TN / (logit_TN.norm(dim=1, keepdim=True) + EPS)
        score_TN = self.scale.to(logit_TN.dtype) * self.constant * F.relu(unit_TN)
        choice_TN, open_N = self.access(unit_TN.detach())
        score_TN = score_TN if open_N is None else score_TN * open_N
        expert_TK = select_top(choice_TN, self.active)
        routing = self.routing(expert_TK, score_TN.gather(1, expert_TK) * self.route_scale)
        if self.options.settings["normalise_scores"]:
            score_TN = score_TN / (score_TN.sum(1, keepdim=True) + EPS)
        routing.scores_TN, routing.logits_TN = score_TN, logit_TN
        if self.training:
            with torch.no_grad():
                self.load += routing.stats["load"]
        if isinstance(self.common, PoolLoad):
            share_N, layers = self.common.share(self.options.pool)
            routing.stats["pool_share"] = share_N / layers
        return routing

    def access(self, unit_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """What experts are chosen by, and (N,) what is left of each one's score: here the logits, in whose order scores are (where
        too few are positive the rest has the weight 0), and all of it."""
        return unit_TN, None


class PoolLoad(nn.Module):
    """The share of the pairs that each expert of a pool had in the last step, over all layers that read it; 0 before the first.

    The buffers `share_0`, `share_1`, ... (N,) are in the state dict, so that a resumed run is exact.

    Args:
        routers: of all layers; those of one pool have one number of it (`RouterOptions.pool`).
    """

    def __init__(self, routers: Sequence[UniPoolRouter]) -> None:
        super().__init__()
        self.readers: dict[int, list[UniPoolRouter]] = {}
        for one in routers:
            self.readers.setdefault(one.options.pool, []).append(one)
        for pool, readers in self.readers.items():
            if len(sizes := {one.experts for one in readers}) > 1:
                raise ValueError(
                    f"layers {', '.join(str(one.options.layer) for one in readers)} read pool {pool}, and choose from {sorted(sizes)} experts:"
                    " number the pools (RouterOptions.pool) as the layers read them"
                )
            self.register_buffer(f"share_{pool}", torch.zeros(readers[0].experts))

    def share(self, pool: int) -> tuple[Tensor, int]:
        """(N,) shares of one pool, and how many layers read it."""
        return cast(Tensor, getattr(self, f"share_{pool}")), len(self.readers[pool])

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Takes over what the layers counted, and forgets their counts. Under data parallelism sum `load` over the ranks first."""
        for pool, readers in self.readers.items():
            # each layer's own share first: one whose forward pass runs twice (activation checkpointing) counts as much as others
            self.take_over(pool, torch.stack([one.load / one.load.sum().clamp(min=1) for one in readers]))
            for one in readers:
                one.load.zero_()

    def take_over(self, pool: int, share_LN: Tensor) -> None:
        """What a step leaves of the shares of a pool's layers: their mean."""
        self.share(pool)[0].copy_(share_LN.mean(0))


# ---- what the weights are at the start ---------------------------------------------------------------------------------------
#
# The logits of a drawn router are independent normals u: ‖u‖ and u/‖u‖ do not know of each other, so a mean over directions is
# one over u divided by a mean of a power of ‖u‖, and those over u are integrals in one or two dimensions.


@cache
def norm_constant(active: int, experts: int) -> float:
    """c0 = E[1/‖s‖] over the a largest of ReLU(u/‖u‖), u ~ N(0, I_N): the weights' length at the start is about σ (2605.06665).

    The paper's is the mean over 100,000 draws; this is the integral itself, without the draws of :data:`SLIGHT`. With
    S = Σ ReLU(u_i)² over the a largest, E[S^-1/2] = 2/√π ∫ E[exp(-x²S)] dx, and given the (a+1)-th largest u the a largest are
    independent.

    Args:
        active: a. experts: N ≥ 2.
    """
    step, start, points = 0.25, -14.0, 77  # of log x: the integrand falls doubly exponentially on either side
    inverse = sum(_laplace(active, experts, math.exp(2 * y)) * math.exp(y) for y in _grid(start, step, points)) * step
    counted = 1 - _above(-SLIGHT) ** experts
    inverse_length = math.exp(math.lgamma((experts - 1) / 2) - math.lgamma(experts / 2)) / math.sqrt(2)
    return 2 / math.sqrt(math.pi) * inverse / counted / inverse_length


@cache
def norm_moments(active: int, experts: int) -> tuple[float, float]:
    """(E[Σ w], E[Σ w²]) of a token's weights at the start, where σ = 1, without R (docs/why/index.md#gates).

    Args:
        active: a. experts: N ≥ 2.
    """
    c = norm_constant(active, experts)
    length = math.sqrt(2) * math.exp(math.lgamma((experts + 1) / 2) - math.lgamma(experts / 2))
    first, second = (_best(active, experts, power) for power in (1, 2))
    return c * first / length, c**2 * second / experts


def _best(active: int, experts: int, power: int) -> float:
    """E[Σ ReLU(u_i)^power] over the a largest of N: a value counts where fewer than a of the others lie above it."""
    return experts * _simpson(lambda v: v**power * _density(v) * _fewer(active, experts - 1, _above(v)), 0.0, 10.0, 240)


def _fewer(bound: int, trials: int, p: float) -> float:
    """P(fewer than ``bound`` of so many trials with success p)."""
    if bound > trials:
        return 1.0
    log, total = trials * math.log1p(-p), 0.0
    for n in range(bound):
        total += math.exp(log)
        log += math.log((trials - n) / (n + 1)) + math.log(p) - math.log1p(-p)
    return min(total, 1.0)


def _laplace(a: int, N: int, s: float) -> float:
    """E[exp(-s·S)] over the draws that count."""
    root = math.sqrt(1 + 2 * s)

    def beyond(t: float) -> float:
        """∫ exp(-s·ReLU(v)²) φ(v) dv from t on."""
        return _above(t * root) / root if t >= 0 else _above(t) - 0.5 + 0.5 / root

    if a == N:
        return beyond(-math.inf) ** N - (beyond(-math.inf) - beyond(SLIGHT)) ** N
    ways = math.lgamma(N + 1) - math.lgamma(a + 1) - math.lgamma(N - a)

    def given(t: float) -> float:
        """The density of the (a+1)-th largest at t, with those above it; less those draws in which none of them is above SLIGHT."""
        if (whole := beyond(t)) == 0:  # below the smallest float, and so is all of it
            return 0.0
        log = ways + (N - a - 1) * math.log(_above(-t)) + a * math.log(whole)
        slight = 1 - beyond(SLIGHT) / whole if t < SLIGHT else 0.0
        return math.exp(log) * _density(t) * (1 - slight**a)

    # where the (a+1)-th largest lies, ten standard deviations either way; the integrand bends at 0 and at SLIGHT
    share = (a + 0.5) / N
    middle = _quantile(1 - share)
    spread = 10 * math.sqrt(share * (1 - share) / N) / _density(middle)
    low, high = max(-9.0, middle - spread), min(9.0, middle + spread)
    ends = [low, *(t for t in (0.0, SLIGHT) if low < t < high), high]
    pieces = [max(4, 2 * math.ceil(36 * (to - at) / (high - low))) for at, to in itertools.pairwise(ends)]
    return sum(_simpson(given, at, to, n) for at, to, n in zip(ends, ends[1:], pieces, strict=False))


# statistics.NormalDist has these as well, to other last bits: every run of UniPool has c0 in its numbers, and every plan m1 and m2
def _quantile(p: float) -> float:
    """Where the standard normal has p below it, by bisection."""
    low, high = -9.0, 9.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _above(-middle) < p else (low, middle)
    return (low + high) / 2


def _density(v: float) -> float:
    return math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


def _above(v: float) -> float:
    return 0.5 * math.erfc(v / math.sqrt(2))


def _grid(start: float, step: float, points: int) -> list[float]:
    return [start + step * i for i in range(points)]


def _simpson(f: Callable[[float], float], low: float, high: float, pieces: int) -> float:
    """Simpson's rule with an even number of pieces."""
    values = [f(v) for v in _grid(low, (high - low) / pieces, pieces + 1)]
    return (high - low) / pieces / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
