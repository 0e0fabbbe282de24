"""Top-p: as many experts as it takes to have p of a token's probability ("Harder Tasks Need More Experts", 2403.07652).

Shape suffixes: T tokens, N experts, K slots: the most that a token of this batch uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.at_init import AtInit, at_init
from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.prefix import even_sums, prefix_of_mass, raw_weights
from mue.moe.routing import Routing
from mue.shapes.routers import LOGIT_STD, MOMENTS_BY_LOGITS
from mue.shapes.settings import Setting


def _at_init(experts: int, settings: Mapping[str, Any]) -> AtInit:
    # where nobody said how far apart they are the logits count as even
    return at_init(experts, settings["p"], settings[LOGIT_STD] or 0.0)


def mean_active(active: int, experts: int, settings: Mapping[str, Any]) -> float:
    """The mean number of active experts at init; ⌈p·N⌉ of even scores."""
    return _at_init(experts, settings).active


def moments(active: int, experts: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """E[Σw], from p to p and one more expert's, and E[Σw²] at init; 1 and E[Σw²] of renormalised weights."""
    found = _at_init(experts, settings)
    return (1.0, found.even_square) if settings["renormalise"] else (found.sum, found.square)


@router(
    "top-p",
    place=2.1,
    unit_sum="renormalise",
    matrix=True,
    grouped=False,
    settings={
        "p": Setting(
            default=0.4, low=0.0, high=1.0, low_open=True, meaning="the part of a token's probability that its experts have together"
        ),
        "renormalise": Setting(default=False, meaning="divide the weights by their sum; else they are the probabilities"),
        **MOMENTS_BY_LOGITS,
    },
    losses={"load_balance": 1e-2, "entropy": 1e-4},
    moments=moments,
    mean_active=mean_active,
)  # fmt: skip
class TopPRouter(MatrixRouter):
    """Softmax over all experts; a token uses the most probable ones up to the one with which they have p of it, at least one.

    The number differs by token and falls as the router grows certain: cost is an outcome here, held down by the entropy loss alone. The
    a of a shape is what its width and operations are counted with; the weights' own moments make the plan right for any a.
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens: P = T·K pairs, token-major, those beyond a token's own being padding (expert N, weight 0)."""
        logit_TN, settings = self.logits(x_TD), self.options.settings
        prob_TN = torch.softmax(logit_TN, dim=1)
        expert_TK = prefix_of_mass(prob_TN, settings["p"], 2 * self.active)
        if settings["renormalise"]:
            weight_TK = even_sums(logit_TN, expert_TK, self.route_scale)
        else:
            weight_TK = raw_weights(prob_TN, expert_TK) * self.route_scale
        routing = self.routing(expert_TK, weight_TK)
        routing.scores_TN, routing.logits_TN = prob_TN, logit_TN
        return routing
