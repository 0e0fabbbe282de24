"""The smallest set of experts that has a given part of a token's probability: what the routers by mass have in common.

Shape suffixes: T tokens, N experts, K slots: the most that a token of this batch uses, with padding for the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.routers.ops import normalised_gates, select_top


@torch.no_grad()
def prefix_of_mass(prob_TN: Tensor, mass: float | Tensor, likely: int) -> Tensor:
    """Each token's experts by falling probability, up to the one with which they have the mass.

    Args:
        prob_TN: (T, N) probabilities, each row summing to 1.
        mass: p; at 1 or above it is every expert, whatever rounding makes of the sum.
        likely: how many are sorted at first; where a token needs more, twice as many, and so on. Changes nothing but the time.

    Returns:
        (T, K) int64 by falling probability, of equal ones the lower index first, then N as padding. Every token has one at least,
        and one of them K.
    """
    experts = prob_TN.shape[1]
    if float(mass) >= 1.0:
        likely = experts
    while True:
        sorted_ = min(max(likely, 1), experts)
        expert_TK = select_top(prob_TN, sorted_)
        sum_TK = prob_TN.gather(1, expert_TK).cumsum(1)
        if sorted_ == experts or not len(sum_TK) or float(sum_TK[:, -1].min()) >= mass:
            break
        likely = 2 * sorted_
    if float(mass) >= 1.0:
        return expert_TK
    inside_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    inside_TK[:, 1:] = sum_TK[:, :-1] < mass
    # as narrow as the batch allows: every further slot costs sorting and summing in the experts
    most = int(inside_TK.sum(1).max()) if len(inside_TK) else 1
    return torch.where(inside_TK, expert_TK, experts)[:, :most].contiguous()


def raw_weights(prob_TN: Tensor, expert_TK: Tensor) -> Tensor:
    """(T, K) the probabilities of each token's experts, 0 for padding; differentiable in ``prob_TN``.

    Args:
        expert_TK: (T, K) int64, N where there is none.
    """
    inside_TK = expert_TK < prob_TN.shape[1]
    return prob_TN.gather(1, torch.where(inside_TK, expert_TK, 0)) * inside_TK


def even_sums(logit_TN: Tensor, expert_TK: Tensor, scale: float) -> Tensor:
    """(T, K) the same over their sum, times ``scale``: a softmax over each token's experts; differentiable in ``logit_TN``.

    Args:
        expert_TK: as above.
    """
    # padding reads an expert that nothing is left for
    return normalised_gates(F.pad(logit_TN, (0, 1), value=-torch.inf), expert_TK, "softmax", scale)
