"""Losses on how certain a router is of each token.

Shape suffixes: T tokens, N experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mue.moe.losses.parts import need, probabilities
from mue.moe.routing import Routing
from mue.shapes.losses import AUXILIARY_LOSSES


@AUXILIARY_LOSSES.register("router_z", place=2)
def router_z(routing: Routing) -> Tensor:
    """:func:`router_z_loss` of the router's logits."""
    return router_z_loss(need(routing, "logits_TN", "router_z"))


@AUXILIARY_LOSSES.register("entropy", place=3)
def entropy(routing: Routing) -> Tensor:
    """The mean over tokens of -Σ P log P ("Harder Tasks Need More Experts", 2403.07652; DTop-p, 2512.13996): fewer experts are needed
    for a part of the probability.

    Returns:
        A scalar in nats, 0 where every token is certain of one expert and log N where it is of none.
    """
    return _entropy(probabilities(routing, "entropy"))


@AUXILIARY_LOSSES.register("hierarchical", place=4)
def hierarchical(routing: Routing) -> Tensor:
    """The mean over tokens of -KL(q ‖ uniform) = H(q) - log N, q the softmax of the logits (Elastic MoE, 2509.21892): ranks move
    apart, so that the best k′ experts are a choice for every k′.

    Returns:
        A scalar in nats from -log N (one expert) to 0 (all alike).
    """
    logit_TN = need(routing, "logits_TN", "hierarchical")
    if routing.num_tokens == 0:
        return logit_TN.sum()
    # by its logarithm, whose gradient is finite wherever q underflows
    log_TN = torch.log_softmax(logit_TN, dim=1)
    return -(log_TN.exp() * log_TN).sum(1).mean() - math.log(routing.num_experts)


def _entropy(prob_TN: Tensor) -> Tensor:
    if prob_TN.shape[0] == 0:
        return prob_TN.sum()
    # of a probability that underflows the logarithm is held finite: 0 · log 0 is 0 here, its gradient too
    return -(prob_TN * prob_TN.clamp(min=torch.finfo(prob_TN.dtype).tiny).log()).sum(1).mean()


def router_z_loss(logit_TN: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps the logits small.

    Args:
        logit_TN: (T, N) router logits.

    Returns:
        A scalar >= 0; 0 when there is no token.
    """
    if logit_TN.shape[0] == 0:
        return logit_TN.sum()
    return torch.logsumexp(logit_TN, dim=1).square().mean()
