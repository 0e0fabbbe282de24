"""What routers by mass do before any training: known from the matrix that they are drawn with, by sampling.

The logits of a token under a matrix of independent normal numbers are independent and normal over experts, whatever the token is. The
samples are the same numbers everywhere, and what is made of them is rounded, so that a plan's hash does not depend on a
machine's last bits.

Shape suffixes: S samples, N experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.routers.draws import uniform

_SAMPLED = 1 << 18  # normal numbers: a mean count is then off by about 0.02
# Of a variance over experts. No paper's number: it is there for tokens whose logits are all equal.
_EPS = 1e-12


class AtInit(NamedTuple):
    """Means over tokens: the number of active experts, E[Σw] and E[Σw²] of raw weights, E[Σw²] of renormalised ones."""

    active: float
    sum: float
    square: float
    even_square: float


def standardised(logit_TN: Tensor) -> Tensor:
    """(z - mean z) / std z over the experts of each token."""
    return F.layer_norm(logit_TN, logit_TN.shape[1:], eps=_EPS)


@lru_cache(maxsize=4)
def _sorted(experts: int, std: float | None) -> tuple[Tensor, Tensor]:
    """(S, N) probabilities, falling, and their sums, of logits with this std; None: of standardised ones."""
    place_S1, expert_N = torch.arange(max(_SAMPLED // experts, 8))[:, None], torch.arange(experts)
    normal_SN = torch.special.ndtri(uniform(2512, 13996, place_S1, expert_N).double().clamp(min=2.0**-25))
    logit_SN = standardised(normal_SN) if std is None else normal_SN * std
    prob_SN = logit_SN.softmax(1).sort(1, descending=True).values
    return prob_SN, prob_SN.cumsum(1)


@lru_cache(maxsize=256)
def at_init(experts: int, p: float, std: float | None) -> AtInit:
    """What the experts up to the mass p are, and weigh, at init.

    Args:
        experts: N. p: the mass. std: of the logits; None: they are standardised.
    """
    prob_SN, sum_SN = _sorted(experts, std)
    inside_SN = torch.ones_like(prob_SN, dtype=torch.bool)
    # even scores sum to k/N only up to rounding
    inside_SN[:, 1:] = (sum_SN[:, :-1] < p - 1e-9) | (p >= 1.0)
    kept_SN = prob_SN * inside_SN
    total_S1 = kept_SN.sum(1, keepdim=True)
    means = inside_SN.sum(1), total_S1[:, 0], kept_SN.square().sum(1), (kept_SN / total_S1).square().sum(1)
    return AtInit(*(float(f"{value.double().mean():.4g}") for value in means))


@lru_cache(maxsize=256)
def mass_for(active: int, experts: int) -> float:
    """The p at which standardised logits have so many active experts on average."""
    _, sum_SN = _sorted(experts, None)
    # the mean count is 1 and, for every rank but the last, the share of samples whose sum up to it is below p
    below = sum_SN[:, :-1].flatten().sort().values
    place = len(sum_SN) * (active - 1)
    return round(float(below[place]), 4) if place < len(below) else 1.0
