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
from torch.autograd.function import once_differentiable

from mue.moe.backends.portable_rows import sorted_pairs
from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.draws import bits, uniform
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.ops import normalised_gates, select_top
from mue.moe.routers.random import DrawingRouter
from mue.moe.routing import Routing, counts
from mue.shapes.routers import LOGIT_STD, MOMENTS_BY_LOGITS
from mue.shapes.settings import Setting

_SECOND, _FACTOR, _BEGIN = range(3)  # what is drawn for
_TABLE = 1 << 13  # places where a row of jitter may begin: a power of two
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
        amount = self.options.settings["jitter"] if self.training else 0.0
        spares = self.training and self.active == 2 and self.options.settings["random_second"]
        key = bits(*self.keys(given), device=x_TD.device) if amount or spares else None
        if amount and key is not None:
            x_TD = jittered(x_TD, amount, key)
        logit_TN = self.logits(x_TD)
        score_TN = torch.softmax(logit_TN, dim=1)
        expert_TK = select_top(score_TN, self.active)
        if self.active == 1:
            weight_TK = score_TN.gather(1, expert_TK) * self.route_scale
        else:
            weight_TK = normalised_gates(logit_TN, expert_TK, "softmax", self.route_scale)
        used_TK = self._used(expert_TK, weight_TK.detach(), key if spares else None)
        routing = self.routing(used_TK, torch.where(used_TK < self.experts, weight_TK, 0.0))
        routing.scores_TN, routing.logits_TN = score_TN, logit_TN
        # a balance loss counts what tokens asked for (2101.03961, eq. 5): what was dropped is what it is there to mend
        routing.stats["demand"] = counts(expert_TK.flatten(), self.experts)
        return routing

    @property
    def reads_batch(self) -> str:
        """Where evaluation drops what finds no room. It draws nothing."""
        if not self.options.settings["evaluation_capacity"]:
            return ""
        return f"evaluation_capacity of {self.kind.name} drops tokens where others were first: leave it at 0"

    def _used(self, expert_TK: Tensor, weight_TK: Tensor, key: Tensor | None) -> Tensor:
        """(T, K) the experts, N in place of those that are spared, where there is a ``key`` to draw by, or have no room."""
        tokens, settings = len(expert_TK), self.options.settings
        if key is not None:
            chance_T = uniform(key, _SECOND, torch.arange(tokens, device=expert_TK.device), device=expert_TK.device)
            used_T = chance_T < 2 * weight_TK[:, 1] / self.route_scale
            expert_TK = torch.stack((expert_TK[:, 0], torch.where(used_T, expert_TK[:, 1], self.experts)), 1)
        room = self._room(tokens, settings["capacity"] if self.training else settings["evaluation_capacity"])
        if room >= tokens:
            return expert_TK
        # all first choices before all second ones (2006.16668, algorithm 1); what is spared takes no room
        fits_P = first_come(expert_TK.t().flatten(), self.experts, room)
        return torch.where(fits_P.view(self.active, -1).t(), expert_TK, self.experts)

    def _room(self, tokens: int, factor: float) -> int:
        """C, in pairs. An expert is asked for at most T, which is room for all."""
        if self.training:
            fits_batch(self.active, self.experts, self.options.settings, tokens)
        elif not factor:
            return tokens
        return math.ceil(factor * tokens * self.active / self.experts)


def first_come(expert_P: Tensor, experts: int, room: int) -> Tensor:
    """(P,) bool: which pairs are among the first ``room`` of their expert.

    Args:
        expert_P: (P,) int64 in [0, N]. room: at least 1.
    """
    order_P = sorted_pairs(expert_P, experts)
    sorted_P, fits_P = expert_P.index_select(0, order_P), torch.ones_like(expert_P, dtype=torch.bool)
    # in the order of experts, a pair finds room where the one that many places before it is another expert's
    fits_P[room:] = sorted_P[room:] != sorted_P[:-room]
    return torch.empty_like(fits_P).scatter_(0, order_P, fits_P)


def jittered(x_TD: Tensor, amount: float, key: Tensor) -> Tensor:
    """Each number times a factor of its own, evenly from [1 - amount, 1 + amount).

    The factors of a row are a stretch of one table of random numbers that begins anywhere in it: a draw for every number of every token
    would take longer than all the rest of routing. Two tokens have the same row in one of 2^13 cases, else numbers independent of
    each other.

    Args:
        key: what the draws depend on.
    """
    tokens, width = x_TD.shape
    place_M = torch.arange(_TABLE + width, device=key.device)
    table_M = (1 - amount) + 2 * amount * uniform(key, _FACTOR, place_M, device=key.device)
    begin_T = bits(key, _BEGIN, torch.arange(tokens, device=key.device), device=key.device) & (_TABLE - 1)
    product_TD: Tensor = TableProduct.apply(x_TD, table_M, begin_T)  # type: ignore[no-untyped-call]
    return product_TD


class TableProduct(torch.autograd.Function):
    """x times rows of a table, which are made again for the gradient: to keep another (T, D) would take longer.

    The name is what a profile shows.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_M: Tensor, begin_T: Tensor) -> Tensor:
        ctx.save_for_backward(table_M, begin_T)
        ctx.dtype = x_TD.dtype
        return _times_rows(x_TD, table_M, begin_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        return _times_rows(dy_TD, *ctx.saved_tensors).to(ctx.dtype), None, None


def _times_rows(x_TD: Tensor, table_M: Tensor, begin_T: Tensor) -> Tensor:
    factor_TD = table_M.unfold(0, x_TD.shape[1], 1).index_select(0, begin_T)
    return factor_TD.to(torch.promote_types(x_TD.dtype, factor_TD.dtype)).mul_(x_TD)
