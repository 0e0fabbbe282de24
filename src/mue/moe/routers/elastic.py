"""Elastic MoE: experts that may be used together later are trained together now (2509.21892).

Shape suffixes: T tokens, N experts, C candidates of a token, K active experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.draws import bits
from mue.moe.routers.ops import select_top
from mue.moe.routers.random import DrawingRouter
from mue.moe.routers.top_k import TopKRouter
from mue.shapes.settings import Setting


def pool_size(active: int, experts: int, settings: Mapping[str, Any]) -> int:
    """How many of a token's best experts may be drawn: the setting, else three times as many as are active, or all."""
    return min(3 * active, experts) if settings["pool"] is None else int(settings["pool"])


def fits(active: int, experts: int, settings: Mapping[str, Any]) -> None:
    """The active experts are drawn from the pool, and the pool from all.

    Raises:
        ValueError: it has fewer than are active, or more than there are.
    """
    if not active <= (pool := pool_size(active, experts, settings)) <= experts:
        raise ValueError(
            f"pool = {pool} of the elastic router must be at least the {active} active and at most the {experts} experts"
        )


@router(
    "elastic",
    place=2.6,
    unit_sum=True,
    matrix=True,
    balance_bias=True,
    stochastic=True,
    grouped=False,
    any_active=True,
    settings={
        "pool": Setting(
            default=None, kind=int, low=1,
            meaning="the best experts of a token that are drawn from in training (k_ideal); else three times the active ones",
        ),
        "random_pool": Setting(
            default=True, meaning="every step draws a size of the pool from the active number up to pool; else it is pool"
        ),
        "score": Setting(default="softmax", choices=("sigmoid", "softmax"), meaning="of an expert"),
    },
    losses={"hierarchical": 1e-3},
    fits=fits,
)  # fmt: skip
class ElasticRouter(DrawingRouter, TopKRouter):
    """In training a of the best k̃ experts of each token, drawn without regard to their order; k̃ is drawn anew in every step and layer,
    evenly from a up to the pool. In evaluation the best, as many as are asked for (:meth:`set_active`).

    So any two of the pool's experts learn to work together, at the cost of a active ones; and the hierarchical loss
    (:func:`mue.moe.losses.sharpness.hierarchical`) spreads the ranks apart, so that the best k′ are a choice for every k′. The weights are
    renormalised over the drawn experts. Draws are functions of seed, layer, step and place (:mod:`mue.moe.routers.draws`), so that
    a recomputed or resumed pass draws the same.
    """

    def select(self, choice_TN: Tensor, active: int, given: RouterInput | None) -> Tensor:
        """(T, active), by falling score."""
        pool = pool_size(self.active, self.experts, self.options.settings)
        if not self.training or pool == active:
            return select_top(choice_TN, active)
        best_TC, tokens, device = select_top(choice_TN, pool), len(choice_TN), choice_TN.device
        drawn, half = bits(*self.keys(given), device=device), (pool + 1) // 2
        # a draw of 63 bits is two numbers of 24: drawing is most of what this costs beyond top-k
        pairs_TH = bits(drawn, torch.arange(tokens * half, device=device).view(tokens, half), device=device) << 1
        key_TC = (pairs_TH.view(torch.int32)[:, :pool] >> 8).float()
        if self.options.settings["random_pool"]:
            size = active + drawn % (pool - active + 1)
            key_TC = torch.where(torch.arange(pool, device=device) < size, key_TC, -torch.inf)
        # the a largest of independent keys are an even draw without replacement; in the order of their ranks, as a top-k has them
        return best_TC.gather(1, select_top(key_TC, active).sort(1).values)

    def end_step_(self, bias_speed: float) -> None:
        """Moves the balance bias, and the next step draws anew."""
        DrawingRouter.end_step_(self, bias_speed)
        TopKRouter.end_step_(self, bias_speed)
