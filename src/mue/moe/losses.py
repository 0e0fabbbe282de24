"""Auxiliary losses and the loss-free balance step of a router, as pure functions.

All are returned without a coefficient. Shape suffixes: B sequences, T tokens, N experts, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balance_loss(prob_TN: Tensor, load_N: Tensor) -> Tensor:
    """N * sum_i f_i * P_i (Switch Transformer, arXiv 2101.03961, eq. 4-6).

    f_i is the share of all pairs that went to expert i (no gradient) and P_i the mean router probability of expert i.
    Dividing by all pairs instead of by tokens makes a balanced router read 1 at every number of active experts.
    Under groups the definition stays global, as the gates do (conventions.md 9): each group's f sums to 1/g by
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


def consistency_loss(logit_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """Mean over tokens of (KL(p‖q) + KL(q‖p)) / 2: how far two passes over one batch disagree (THOR, arXiv 2110.04260).

    Args:
        logit_BTV, other_BTV: (..., B, T, V) logits of p and of q. Both get gradients: each pass teaches the other.

    Returns:
        A scalar ≥ 0 in nats, in float32 or better, 0 where the two are equal; of stacked variants one each.
    """
    dtype = torch.promote_types(logit_BTV.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(x.to(dtype), dim=-1) for x in (logit_BTV, other_BTV))
    # KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q): the two entropies cancel.
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).flatten(-2).mean(-1)
