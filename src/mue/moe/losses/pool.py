"""The loss that balances a pool of experts over all layers that read it.

Shape suffixes: T tokens, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mue.moe.losses.parts import need, probabilities
from mue.moe.routing import Routing
from mue.shapes.losses import AUXILIARY_LOSSES


@AUXILIARY_LOSSES.register("pool_balance", place=5)
def pool_balance(routing: Routing) -> Tensor:
    """:func:`pool_balance_loss` of one layer, with ``stats["pool_share"]``: f over the number of layers, so that the sum over them is
    the pool's loss.

    Raises:
        ValueError: the routing says nothing of a pool.
    """
    share_N = routing.stats.get("pool_share")
    if share_N is None:
        raise ValueError(
            "the loss pool_balance reads the load of a pool of experts, and this routing has none: it is for routers with"
            " pools, once their model has told them of each other (mue.moe.routers.base.share); or leave the loss out"
        )
    return pool_balance_loss(need(routing, "scores_TN", "pool_balance"), share_N)


@AUXILIARY_LOSSES.register("cardinality", place=6)
def cardinality(routing: Routing) -> Tensor:
    """(H - log K)²: how far a layer's mean routing is from K experts' even use, H its entropy (UniPool-lock, 2605.06665).

    K is ``exp(stats["cardinality_target"])``; ``stats["cardinality_weight"]``, over the number of layers, is how much of it counts now.

    Raises:
        ValueError: the routing says nothing of either.
    """
    target, weight = (routing.stats.get(f"cardinality_{part}") for part in ("target", "weight"))
    if target is None or weight is None:
        raise ValueError(
            "the loss cardinality is for routers whose pool is shared out (unipool-lock), once their model has told them of each"
            " other (mue.moe.routers.base.share): leave it out"
        )
    prob_TN = probabilities(routing, "cardinality")
    if routing.num_tokens == 0:
        return prob_TN.sum()
    prob_N = prob_TN.mean(0)
    # the slope of p·log p at 0 has no bound, and an expert that no token wants is no reason for one
    entropy = -(prob_N * prob_N.clamp(min=1e-12).log()).sum()
    return weight.to(entropy.dtype) * (entropy - target.to(entropy.dtype)).square()


def pool_balance_loss(score_TN: Tensor, share_N: Tensor) -> Tensor:
    """N · Σ_i f_i · P_i of one layer that reads a pool (UniPool, 2605.06665): its scores against the load of all layers.

    A layer may use few experts; what all of them choose together is to be flat.

    Args:
        score_TN: (T, N) scores of all experts, of which P is the mean over tokens. Raw ones need not sum to 1: the loss is then
            Σ P at a balanced load, and its gradient also makes scores smaller.
        share_N: (N,) f, the share of all layers' pairs that each expert had in the last step; zeros where there was none.

    Returns:
        A scalar; 0 when there is no token or no last step.
    """
    if score_TN.shape[0] == 0:
        return score_TN.sum()
    return score_TN.shape[1] * torch.dot(share_N.to(score_TN.dtype), score_TN.mean(0))
