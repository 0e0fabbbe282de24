"""Switch and GShard: one or two experts for each token, up to what an expert has room for (Fedus et al., 2101.03961; Lepikhin
et al., 2006.16668).

Shape suffixes: T tokens, D width, N experts, K active experts per token, P = T*K pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mue.moe.backends.portable_rows import sorted_pairs
from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.draws import bits, uniform
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.ops import normalised_gates, select_top
from mue.moe.routers.random import DrawingRouter
from mue.moe.routing import Routing
from mue.shapes.routers import LOGIT_STD, MOMENTS_BY_LOGITS
from mue.shapes.settings import Setting

_SECOND, _FACTOR, _BEGIN = range(3)  # what is drawn for
_TABLE = 1 << 13  # places where a row of jitter may begin
_NORMAL = NormalDist()
_GRID = [i / 10 for i in range(-60, 101)]  # the largest of 10^7 normal numbers is about 5.2


def fits(active: int, experts: int, settings: Mapping[str, Any]) -> None:
    """One expert as in Switch, or two as in GShard.

    Raises:
        ValueError: any other number.
    """
    if active not in (1, 2):
        raise ValueError(
            f"the switch router uses 1 expert per token (Switch) or 2 (GShard), got {active} active: write e.g. {experts}e2a,"
            ' or take router = "softmax"'
        )


def fits_batch(active: int, experts: int, settings: Mapping[str, Any], tokens: int) -> None:
    """Room for at least one token at each expert.

    Raises:
        ValueError: there is less; names the numbers.
    """
    if (room := settings["capacity"] * tokens * active / experts) < 1 and tokens:
        raise ValueError(
            f"capacity = {settings['capacity']:g} of the switch router leaves each of {experts} experts room for {room:.2g} of"
            f" {tokens} tokens, which drops them all: set it to {experts / (tokens * active):.2g} or more, or give more tokens at once"
        )


def moments(active: int, experts: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """E[Σw] and E[Σw²] over tokens that are not dropped, of N independent Gaussian logits (ours).

    For two experts exact. For one, the other parts of the softmax are taken at their mean: within 2.5 % and 7 % for N ≥ 4 and logits
    of std up to 0.6.
    """
    std = settings[LOGIT_STD] or 0.0
    if active == 1:
        return _moments_of_one(experts, std)
    return _moments_of_two(experts, std, settings["random_second"])


@lru_cache(maxsize=256)
def _moments_of_one(experts: int, std: float) -> tuple[float, float]:
    """The largest part of a softmax: x is the largest of N normal numbers, the others' mean e^{std·g} is that below x."""
    phi, Phi = _NORMAL.pdf, _NORMAL.cdf
    first = second = total = 0.0
    for x in _GRID:
        if (below := Phi(x)) > 0 and (density := phi(x) * below ** (experts - 1)) > 0:
            others = (experts - 1) * math.exp(std * std / 2 - std * x) * Phi(x - std) / below
            weight = 1 / (1 + others)
            first, second, total = first + density * weight, second + density * weight**2, total + density
    return first / total, second / total


@lru_cache(maxsize=256)
def _moments_of_two(experts: int, std: float, spared: bool) -> tuple[float, float]:
    """The two largest, x > y, of N normal numbers: w₂ = sigmoid(std·(y - x)), used with probability 2·w₂ where some are spared."""
    first = second = total = 0.0
    phis = [_NORMAL.pdf(x) for x in _GRID]
    for j, y in enumerate(_GRID):
        if (density_y := phis[j] * _NORMAL.cdf(y) ** (experts - 2)) <= 0:
            continue
        for x, phi_x in zip(_GRID[j:], phis[j:], strict=True):
            density = density_y * phi_x * (0.5 if x == y else 1.0)
            less = 1 / (1 + math.exp(std * (x - y)))
            used = 2 * less if spared else 1.0
            first += density * (1 - less + used * less)
            second += density * ((1 - less) ** 2 + used * less**2)
            total += density
    return first / total, second / total


@router(
    "switch",
    unit_sum=False,
    score="softmax",
    matrix=True,
    stochastic=True,
    grouped=False,
    settings={
        "capacity": Setting(
            default=1.25, low=0.0, low_open=True,
            meaning="capacity factor in training: an expert has room for so many times its even share of the tokens",
        ),
        "evaluation_capacity": Setting(
            default=0.0, low=0.0, meaning="capacity factor in evaluation; 0: there is room for all"
        ),
        "jitter": Setting(
            default=0.01, low=0.0, high=1.0, high_open=True,
            meaning="in training the router sees each number of a token times one from 1 - jitter to 1 + jitter",
        ),
        "random_second": Setting(
            default=True, meaning="of two experts the second is used with twice its weight for probability, in training"
        ),
        **MOMENTS_BY_LOGITS,
    },
    losses={"load_balance": 1e-2},
    fits=fits,
    fits_batch=fits_batch,
    moments=moments,
)  # fmt: skip
class SwitchRouter(MatrixRouter, DrawingRouter):
    """Softmax over all experts. With one active expert (Switch) its weight is its part p of the softmax, not renormalised, since
    that is what its gradient comes by. With two (GShard) the weights are renormalised over both, and the second is used with
    probability 2·w₂ in training: a second choice that would add little is spared.

    An expert has room for C = ⌈capacity · T·a/N⌉ pairs of a batch. First choices come before second ones, and then those of earlier
    tokens first; what finds no room is dropped, and that token keeps what its residual stream has. (So which second choices
    are dropped depends on later tokens. In evaluation nothing is, unless ``evaluation_capacity`` says otherwise.)
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens: P = T·a pairs, token-major; a dropped one is padding (expert N, weight 0).

        Raises:
            ValueError: in training, there is room for less than one token at each expert.
        """
        amount, key = self.options.settings["jitter"], bits(*self.keys(given), device=x_TD.device)
        if self.training and amount:
            x_TD = x_TD * jitter(key, amount, *x_TD.shape)
        logit_TN = self.logits(x_TD)
        score_TN = torch.softmax(logit_TN, dim=1)
        expert_TK = select_top(score_TN, self.active)
        if self.active == 1:
            weight_TK = score_TN.gather(1, expert_TK) * self.route_scale
        else:
            weight_TK = normalised_gates(logit_TN, expert_TK, "softmax", self.route_scale)
        used_TK = self._used(expert_TK, weight_TK.detach(), key)
        routing = self.routing(torch.where(used_TK, expert_TK, self.experts), torch.where(used_TK, weight_TK, 0.0))
        routing.scores_TN, routing.logits_TN = score_TN, logit_TN
        # a balance loss counts what tokens asked for (2101.03961, eq. 5): what was dropped is what it is there to mend
        routing.stats["demand"] = torch.zeros_like(routing.stats["load"]).scatter_add_(
            0, expert_TK.flatten(), torch.ones_like(expert_TK.flatten())
        )
        return routing

    def _used(self, expert_TK: Tensor, weight_TK: Tensor, key: Tensor) -> Tensor:
        """(T, K) bool: which pairs are neither spared nor dropped."""
        wanted_TK, settings = torch.ones_like(expert_TK, dtype=torch.bool), self.options.settings
        if self.training and self.active == 2 and settings["random_second"]:
            place_T = torch.arange(len(expert_TK), device=expert_TK.device)
            chance_T = uniform(key, _SECOND, place_T, device=expert_TK.device)
            wanted_TK[:, 1] = chance_T < 2 * weight_TK[:, 1] / self.route_scale
        factor = settings["capacity"] if self.training else settings["evaluation_capacity"]
        room = self._room(len(expert_TK), factor)
        if room >= len(expert_TK):
            return wanted_TK
        # all first choices before all second ones (2006.16668, algorithm 1); what is spared takes no room
        queue_P = torch.where(wanted_TK, expert_TK, self.experts).t().flatten()
        return wanted_TK & (place_in_queue(queue_P, self.experts) < room).view(self.active, -1).t()

    def _room(self, tokens: int, factor: float) -> int:
        """C, in pairs. An expert is asked for at most T, which is room for all."""
        if self.training:
            fits_batch(self.active, self.experts, self.options.settings, tokens)
        elif not factor:
            return tokens
        return math.ceil(factor * tokens * self.active / self.experts)


def place_in_queue(expert_P: Tensor, experts: int) -> Tensor:
    """(P,) how many pairs of the same expert come before each pair.

    Args:
        expert_P: (P,) int64 in [0, N].
    """
    order_P = sorted_pairs(expert_P, experts)
    load_N = torch.zeros(experts + 1, dtype=torch.int64, device=expert_P.device)
    load_N = load_N.scatter_add_(0, expert_P, torch.ones_like(expert_P))
    begin_N = load_N.cumsum(0) - load_N
    place_P = torch.arange(len(expert_P), device=expert_P.device) - begin_N[expert_P[order_P]]
    return torch.empty_like(place_P).scatter_(0, order_P, place_P)


def jitter(key: Tensor, amount: float, tokens: int, width: int) -> Tensor:
    """(T, D) factors, each evenly from [1 - amount, 1 + amount).

    The rows are stretches of one table of random numbers that begin anywhere in it: a draw for every number of every token would take
    longer than all the rest of routing. Two tokens have the same row in one of 2^13 cases, else numbers independent of each other.

    Args:
        key: what the draws depend on.
    """
    place_M = torch.arange(_TABLE + width, device=key.device)
    table_M = (1 - amount) + 2 * amount * uniform(key, _FACTOR, place_M, device=key.device)
    begin_T = bits(key, _BEGIN, torch.arange(tokens, device=key.device), device=key.device) % _TABLE
    return table_M.unfold(0, width, 1).index_select(0, begin_T)
