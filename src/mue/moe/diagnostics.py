"""What can be seen of a router in one of its routings: numbers small enough for every evaluation, and matrices for the end of a run.

Any `Routing` will do: top-k, ragged, expert choice. What a router cannot have (an entropy, where it has no scores) is None, and
:func:`absent` says why. Everything is computed in float64, or counted.

Shape suffixes: T tokens, P pairs, N experts, C classes of tokens, D width, H expert width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mue.moe.routing import Routing, expert_load, gate_moments

_CHUNK = 1 << 14  # tokens at a time of a product over all of them: a (T, N) table in float64 stays small


@torch.no_grad()
def measure(routing: Routing) -> dict[str, Any]:
    """What a routing of a batch says of its router, as plain numbers; padding pairs count nowhere.

    Returns:
        active, spread: mean and standard deviation over tokens of the number of active experts.
        idle: share of the tokens without any expert (dropped by a capacity, or chosen by none).
        m1, m2: E[Σw] and E[Σw²] over tokens, R divided out. F = ā·m2/m1²: 1 for even weights, a for one-hot ones
            (docs/why/index.md#gates).
        share: (N,) share of the tokens that each expert sees; the plan counts on a/N.
        max_vio: max load / mean load − 1, 0 where balanced (MaxVio of 2408.15664); None without a pair. dead: experts without a token.
        effective: exp of the entropy of the load, the number of evenly used experts that would be as uneven.
        entropy: mean over tokens of −Σ p log p in nats, p the scores over their sum; None where there are none.
    """
    tokens, experts = routing.num_tokens, routing.num_experts
    load_N = expert_load(routing)[:experts].double()
    count_T = active_counts(routing).double()
    m1, m2 = gate_moments(routing)
    active, pairs = float(count_T.mean()), float(load_N.sum())
    share_N = load_N / max(pairs, 1.0)
    return {
        "active": active,
        "spread": float(count_T.std(correction=0)),
        "idle": float((count_T == 0).double().mean()),
        "m1": finite(m1),
        "m2": finite(m2),
        "F": finite(active * m2 / m1**2) if m1 else None,
        "share": (load_N / tokens).tolist(),
        "max_vio": float(share_N.max()) * experts - 1 if pairs else None,
        "dead": int((load_N == 0).sum()),
        "effective": math.exp(float(torch.special.entr(share_N).sum())) if pairs else 0.0,
        "entropy": _entropy(routing),
    }


def absent(routing: Routing) -> dict[str, str]:
    """Which measurements this routing cannot have, each with the reason."""
    if routing.scores_TN is None:
        return {"entropy": "the router has no scores"}
    return {"entropy": "its scores are no distribution"} if _entropy(routing) is None else {}


def finite(x: float) -> float | None:
    """The number, or None: JSON has no others."""
    return x if math.isfinite(x) else None


def active_counts(routing: Routing) -> Tensor:
    """(T,) int64, the number of experts of each token."""
    real_P = (routing.expert_P < routing.num_experts).long()
    count_T = torch.zeros(routing.num_tokens, dtype=torch.int64, device=real_P.device)
    return count_T.scatter_add_(0, routing.token_P, real_P)


def _entropy(routing: Routing) -> float | None:
    """Mean entropy in nats of the scores over their sum; a token whose scores are all 0 has no distribution and is left out."""
    if routing.scores_TN is None:
        return None
    score_TN = routing.scores_TN.detach().double()
    sum_T = score_TN.sum(1)
    score_TN, sum_T = score_TN[sum_T != 0], sum_T[sum_T != 0]
    if not len(sum_T) or bool((score_TN < 0).any()):
        return None
    return finite(float(torch.special.entr(score_TN / sum_T[:, None]).sum(1).mean()))


def incidence(routing: Routing) -> Tensor:
    """(T, N) bool: is this token with this expert?"""
    table_TN = torch.zeros(
        routing.num_tokens, routing.num_experts + 1, dtype=torch.bool, device=routing.expert_P.device
    )
    table_TN[routing.token_P, routing.expert_P] = True
    return table_TN[:, :-1]


@torch.no_grad()
def coactivation(routing: Routing) -> Tensor:
    """(N, N) int64: tokens that have both experts; on the diagonal, all tokens of the expert.

    Row i over its diagonal is the share of i's tokens that go to j as well: expert co-activation of 2409.02060 (OLMoE, section 5).
    """
    return _products(incidence(routing), incidence(routing))


@torch.no_grad()
def specialisation(routing: Routing, class_T: Tensor, classes: int) -> Tensor:
    """(C, N) int64: tokens of each class at each expert.

    A row over the number of tokens of its class is the specialisation of 2409.02060 (OLMoE, section 5), with classes for its
    domains: a/N everywhere where experts do not care.

    Args:
        class_T: (T,) int64, the class of each token, in [0, C).
    """
    return _products(torch.nn.functional.one_hot(class_T, classes), incidence(routing))


def _products(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """leftᵀ·right in whole numbers: float64 holds counts exactly, and has a fast product, which integers lack."""
    total_MN = left_TM.new_zeros(left_TM.shape[1], right_TN.shape[1], dtype=torch.float64)
    for left, right in zip(torch.split(left_TM, _CHUNK), torch.split(right_TN, _CHUNK), strict=True):
        total_MN += left.double().T @ right.double()
    return total_MN.long()


@torch.no_grad()
def overlap(down_NDH: Tensor) -> Tensor:
    """(N, N) cosines between the experts' flattened down projections (2406.18219, section 4.1: similarity at the level of matrices).

    At init it is 0 but for chance (± 1/√(D·H)); twins read 1. It is blind to experts that are the same but for the order of
    their neurons.
    """
    flat_NF = down_NDH.detach().flatten(1).double()
    unit_NF = flat_NF / flat_NF.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosine_NN: Tensor = unit_NF @ unit_NF.T
    return cosine_NN
