"""Losses that spread tokens over experts, and the loss-free step of a balance bias.

Shape suffixes: S sequences, T tokens, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mue.moe.losses.parts import need, probabilities
from mue.moe.routing import Routing
from mue.shapes.losses import AUXILIARY_LOSSES


@AUXILIARY_LOSSES.register("load_balance", place=0)
def load_balance(routing: Routing) -> Tensor:
    """:func:`load_balance_loss` of all tokens together.

    f counts what the router asked for: ``stats["demand"]``, where pairs were dropped for want of room, else ``stats["load"]``.
    """
    load_N = routing.stats.get("demand", routing.stats["load"])
    return load_balance_loss(probabilities(routing, "load_balance"), load_N)


@AUXILIARY_LOSSES.register("sequence_balance", place=1)
def sequence_balance(routing: Routing) -> Tensor:
    """The mean over sequences of N · Σ_i f_i · P_i within each (DeepSeek-V3, 2412.19437, eq. 17–20): no sequence overloads an expert.

    f counts the pairs as they were routed, a balance bias included; padding counts nowhere.

    Returns:
        A scalar, 1 where every sequence is balanced.
    """
    length = int(need(routing, "sequence", "sequence_balance"))
    prob_TN = probabilities(routing, "sequence_balance")
    experts = routing.num_experts
    if routing.num_tokens == 0:
        return prob_TN.sum()
    prob_SN = prob_TN.view(-1, length, experts).mean(1)
    place_P = (routing.token_P // length) * (experts + 1) + routing.expert_P
    load_SN = prob_SN.new_zeros(prob_SN.shape[0] * (experts + 1))
    load_SN = load_SN.scatter_add_(0, place_P, torch.ones_like(place_P, dtype=load_SN.dtype))
    load_SN = load_SN.view(-1, experts + 1)[:, :experts]
    share_SN = load_SN / load_SN.sum(1, keepdim=True).clamp(min=1)
    return experts * (share_SN * prob_SN).sum(1).mean()


def load_balance_loss(prob_TN: Tensor, load_N: Tensor) -> Tensor:
    """N * sum_i f_i * P_i (Switch Transformer, arXiv 2101.03961, eq. 4-6).

    f_i is the share of all pairs that went to expert i (no gradient) and P_i the mean router probability of expert i.
    Dividing by all pairs instead of by tokens makes a balanced router read 1 at every number of active experts.
    Under groups the definition stays global, as the gates do: each group's f sums to 1/g by
    construction, so the gradient acts between the experts of a group and between groups alike.

    Args:
        prob_TN: (T, N) router probabilities, each row summing to 1 (softmax, or sigmoid scores divided by their sum).
        load_N: (N,) pairs per expert.

    Returns:
        A scalar, 1 when balanced and N when all pairs and all probability are on one expert; 0 when there is no token.
    """
    tokens, experts = prob_TN.shape
    if tokens == 0:
        return prob_TN.sum()
    # f has no gradient (a count has none); P carries it, weighted by f: overloaded experts are pushed down hardest
    share_N = load_N.to(prob_TN.dtype) / load_N.sum().clamp(min=1)
    return experts * torch.dot(share_N.detach(), prob_TN.mean(0))


def balance_bias_step(load_N: Tensor, speed: float) -> Tensor:
    """speed * sign(mean load - load): what to add to the selection bias (aux-loss-free, arXiv 2408.15664, alg. 1).

    Args:
        load_N: (N,) pairs per expert since the last step. Only the sign against the mean counts, so load seen twice
            (activation checkpointing) changes nothing. Experts exactly at the mean do not move.
        speed: the size of one step, in units of the score (the paper: 1e-3). The plan leaves it unchanged.

    Returns:
        (N,) float32.
    """
    load_N = load_N.double()  # counts stay exact; a float32 mean would move experts that are exactly at it
    return speed * torch.sign(load_N.mean() - load_N).float()
