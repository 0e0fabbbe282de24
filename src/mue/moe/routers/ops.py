"""The parts of a router that are the same in most of them, by the native kernel where it can, else by torch.

A router file reads as its mathematics; the one place that knows of the kernel is here.

Shape suffixes: T tokens, N experts, G groups, K active experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.backends import native_route
from mue.moe.routing import Routing, routing_stats


def select_top(score_TN: Tensor, active: int, groups: int = 1) -> Tensor:
    """The `active` best experts of each token, `active/groups` inside each group of consecutive experts.

    Equal scores go to the lower expert index, on every device.

    Args:
        score_TN: (T, N); compared in float32.

    Returns:
        (T, active) int64, by group and then by falling score.
    """
    if (best_TK := native_route.select_top(score_TN.detach(), active, groups)) is not None:
        return best_TK
    tokens, experts = score_TN.shape
    size = experts // groups
    best = _without_ties(score_TN).view(tokens, groups, size).topk(active // groups, dim=2).indices
    if groups > 1:
        best = best + torch.arange(0, experts, size, device=best.device)[:, None]
    return best.reshape(tokens, active)


def take_top(score_TN: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of each expert that score best with it; equal scores go to the earlier token, on every device.

    Tokens of equal hidden states are no rarity: the first of two sequences, say. Which of them an expert takes must not hang on a
    rounding.

    Args:
        score_TN: (T, N); compared in float32.

    Returns:
        (N, count) int64, in no order.
    """
    # rows of one expert's scores lie together: several times as fast as along the columns
    return _without_ties(score_TN.t().contiguous()).topk(count, dim=1, sorted=False).indices


def _without_ties(score_XN: Tensor) -> Tensor:
    """int64 in the order of a row's scores, of equals the first the largest: torch.topk leaves ties open.

    A float32 reads as an integer of the same order once the magnitude bits of negatives are flipped; the index goes below it.
    """
    size = score_XN.shape[1]
    bits_XN = (score_XN.detach().float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    bits_XN = bits_XN ^ ((bits_XN >> 31) & 0x7FFFFFFF)
    return bits_XN.long() * size + torch.arange(size - 1, -1, -1, device=score_XN.device)


def normalised_gates(logit_TN: Tensor, expert_TK: Tensor, score: str, scale: float) -> Tensor:
    """The scores of each token's experts, divided by their sum, times ``scale``; differentiable in the logits.

    Args:
        logit_TN: (T, N). expert_TK: (T, K) int64, which of them are active.
        score: "sigmoid" or "softmax". scale: R.

    Returns:
        (T, K) in the logits' type; each row sums to ``scale``.
    """
    sigmoid = score == "sigmoid"
    if (weight_TK := native_route.gates(logit_TN, expert_TK, sigmoid, scale)) is not None:
        return weight_TK
    # s_i / Σ s = softmax(log s): the same weights, and no 0/0 where every sigmoid underflows.
    picked_TK = logit_TN.gather(1, expert_TK)
    return torch.softmax(F.logsigmoid(picked_TK) if sigmoid else picked_TK, dim=1) * scale


def with_stats(routing: Routing) -> Routing:
    """The routing, its ``stats`` filled in (:func:`mue.moe.routing.routing_stats`)."""
    routing.stats = native_route.routing_stats(routing) or routing_stats(routing)
    return routing
