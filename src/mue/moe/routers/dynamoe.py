"""DynaMoE: experts whose logits pass a percentile of the token's own, up to a cap, and fewer or more experts by depth (2603.01697).

The second half is a schedule of shapes: :mod:`mue.shapes.schedule`.

Shape suffixes: T tokens, D width, N experts, K active experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.ops import normalised_gates, select_top
from mue.moe.routing import Routing
from mue.shapes.settings import Setting


def above_percentile(experts: int, percentile: float) -> int:
    """⌈(1 - τ/100)·N⌉, how many of N different numbers lie above the τ-th percentile of themselves, at least one."""
    return max(1, math.ceil(experts * (1 - percentile / 100) - 1e-9))


def fits(active: int, experts: int, settings: Mapping[str, Any]) -> None:
    """The cap is what is used.

    Raises:
        ValueError: fewer experts pass the percentile than the shape has active.
    """
    passing = above_percentile(experts, settings["percentile"])
    if active > passing:
        raise ValueError(
            f"the dynamoe router uses the experts above percentile = {settings['percentile']:g} of their logits, at most as many as are"
            f" active: of {experts} experts {passing} pass it, fewer than {active} active; lower the percentile, or have {passing} active"
        )


@router(
    "dynamoe",
    place=2.7,
    unit_sum=True,
    score="softmax",
    matrix=True,
    grouped=False,
    any_active=True,
    settings={
        "percentile": Setting(
            default=50.0, low=0.0, high=100.0, high_open=True,
            meaning="τ: a token's experts have logits above this percentile of its own; the shape's active ones are their cap",
        )
    },
    losses={"load_balance": 1e-2},
    fits=fits,
)  # fmt: skip
class DynaMoERouter(MatrixRouter):
    """The experts above the percentile, from one up to the cap a, weighted by a softmax over them.

    A percentile of the same token's logits fixes their number (ties aside): min(a, ⌈(1 - τ/100)·N⌉). So the plan is exact, and what
    differs, differs by layer.
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens by their hidden states alone: P = T·a pairs, token-major."""
        logit_TN, (active, factor) = self.logits(x_TD), self.in_use
        expert_TK = select_top(logit_TN.detach(), active)
        weight_TK = normalised_gates(logit_TN, expert_TK, "softmax", self.route_scale * factor)
        routing = self.routing(expert_TK, weight_TK)
        routing.scores_TN, routing.logits_TN = torch.softmax(logit_TN, dim=1), logit_TN
        return routing
