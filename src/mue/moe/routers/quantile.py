"""Quantile-balanced routing: each expert's threshold is the quantile of its scores that gives it its share of the tokens.

The form is that of the repository marin-community/marin (``MoEMLP`` in experiments/grug/moe/model.py at 0080498, its "QB" routing),
described here in our own words; the idea is Jianlin Su's (kexue.fm/archives/11619), who reads it off the dual of an assignment problem.

Shape suffixes: T tokens, N experts, K active experts per token, M = T·g choices (one in each group of a token), S = N/g experts
of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.ops import normalised_gates, select_top
from mue.moe.routers.thresholds import ThresholdRouter
from mue.moe.routing import Routing
from mue.shapes.settings import Setting


@router(
    "quantile",
    unit_sum=True,
    score="sigmoid",
    matrix=True,
    any_active=True,
    settings={
        "memory": Setting(
            default=0.0, low=0.0, high=1.0, high_open=True, meaning="of the threshold: what of it stays in every step"
        )
    },
)
class QuantileRouter(ThresholdRouter):
    """A token takes the a experts of which its logits exceed the thresholds β by most; its weights are their sigmoids, renormalised.

    A token would have taken expert i as well had its logit minus β_i passed α, the (a+1)-th largest of all. So after every pass β_i is
    set to the q-th largest over tokens of (logit_i - α), q = T·a/N: at that threshold expert i would have had its share. It holds
    from the next step on, so that no token is routed by those after it. Nothing is tuned: no loss, and no step size as the bias walk
    of 2408.15664 has.

    Settings: ``memory`` averages β over steps (Marin and the source: 0). Groups are balanced each by itself (ours).
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens by their hidden states and the thresholds of the steps before: P = T·a pairs, token-major."""
        logit_TN = self.logits(x_TD)
        active, factor = self.in_use
        size, each = self.experts // self.groups, active // self.groups
        # each group of a token is a choice of its own: one more row
        free_MS = (logit_TN.detach() - self.threshold).view(-1, size)
        further = min(each + 1, size)
        best_MK = select_top(free_MS, further)
        first_G1 = torch.arange(0, self.experts, size, device=x_TD.device)[:, None]
        expert_TK = (best_MK[:, :each].view(-1, self.groups, each) + first_G1).flatten(1)
        if self.training and further > each:  # where all experts are active there is nothing to balance
            self._balance(logit_TN.detach(), free_MS.gather(1, best_MK[:, each:]))
        weight_TK = normalised_gates(logit_TN, expert_TK, "sigmoid", factor * self.route_scale)
        routing = self.routing(expert_TK, weight_TK)
        routing.scores_TN, routing.logits_TN = torch.sigmoid(logit_TN), logit_TN
        return routing

    def _balance(self, logit_TN: Tensor, cutoff_M1: Tensor) -> None:
        """Tells the thresholds where they would have been right for these tokens."""
        tokens = len(logit_TN)
        if tokens == 0:
            return
        over_TN = (logit_TN.view(len(cutoff_M1), -1) - cutoff_M1).view_as(logit_TN)
        count = max(1, round(tokens * self.active / self.experts))
        # rows of one expert lie together: three times as fast as along the columns
        quantile_N = over_TN.t().contiguous().topk(count, dim=1, sorted=False).values.amin(1)
        # what all of a group have in common moves no choice, and would add up over steps
        quantile_GS = quantile_N.view(self.groups, -1)
        self.observe((quantile_GS - quantile_GS.mean(1, keepdim=True)).flatten())
