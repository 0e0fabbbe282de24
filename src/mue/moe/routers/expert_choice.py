"""Expert choice: experts take tokens, instead of tokens experts (Zhou et al., "Mixture-of-Experts with expert choice routing",
2202.09368).

Shape suffixes: T tokens, N experts, Q tokens of an expert, P pairs; S sequences of L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.ops import select_top, take_top, with_stats
from mue.moe.routers.thresholds import ThresholdRouter
from mue.moe.routing import Routing
from mue.shapes.routers import LOGIT_STD, MOMENTS_BY_LOGITS, TOKEN_STD
from mue.shapes.settings import Setting

BY_THRESHOLD, BY_BATCH = "threshold", "batch"
BATCH, SEQUENCE = "batch", "sequence"


def moments(active: int, experts: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """E[Σw] and E[Σw²] of softmax weights over a token's experts, where each expert takes the a/N of all tokens that like it most.

    Of N Gaussian logits of std s, where N is large: w = exp(s·g - s²/2)/N with g beyond the (1 - a/N) quantile z of a standard
    normal, so that E[Σw] = Q(z - s) and E[Σw²] = exp(s²)·Q(z - 2s)/N, Q the upper tail (ours; 5 % and 20 % too high at N = 8, s = 0.6).
    Where an expert's logits of different tokens lie less far apart, as those of an image's patches, that std chooses: s in Q, and
    not in exp(s²).
    """
    normal, std = NormalDist(), settings[LOGIT_STD] or 0.0
    if active == experts or std == 0:
        return active / experts, active / experts**2
    z, own = normal.inv_cdf(1 - active / experts), settings.get(TOKEN_STD)
    own = std if own is None else own
    return normal.cdf(own - z), math.exp(std**2) * normal.cdf(2 * own - z) / experts


def fits_batch(active: int, experts: int, settings: Mapping[str, Any], tokens: int) -> None:
    """At least one token for each expert.

    Raises:
        ValueError: there are fewer; names the numbers.
    """
    if 0 < tokens * active < experts:
        raise ValueError(
            f"expert choice gives each of {experts} experts {tokens}·{active}/{experts} = {tokens * active / experts:g} of {tokens}"
            f" tokens: give it at least {-(-experts // active)} tokens at once, or use fewer experts"
        )


def fits_sequence(active: int, experts: int, settings: Mapping[str, Any], tokens: int) -> None:
    """A whole number of a sequence's tokens for each expert, where they are taken within it: rounding would change a.

    Raises:
        ValueError: there is none; names the numbers.
    """
    if settings["within"] == SEQUENCE and tokens * active % experts:
        raise ValueError(
            f"expert choice within a sequence gives each of {experts} experts {tokens}·{active}/{experts} = {tokens * active / experts:g}"
            f" of its {tokens} tokens, which has to be a whole number: choose other experts or active ones"
        )


@router(
    "expert-choice",
    unit_sum=False,
    score="softmax",
    matrix=True,
    grouped=False,
    settings={
        "evaluation": Setting(
            default=BY_THRESHOLD,
            choices=(BY_THRESHOLD, BY_BATCH),
            meaning="how tokens are chosen in evaluation: by a threshold per expert, which reads no other token, or from the batch",
        ),
        "memory": Setting(
            default=0.9, low=0.0, high=1.0, high_open=True, meaning="of the threshold: what of it stays in every step"
        ),
        "within": Setting(
            default=BATCH,
            choices=(BATCH, SEQUENCE),
            meaning="what an expert takes its tokens from: the batch, or each sequence, in evaluation too (EC-DiT; not for causal models)",
        ),
        **MOMENTS_BY_LOGITS,
        TOKEN_STD: Setting(
            default=None,
            kind=float,
            low=0.0,
            meaning="std of an expert's logits over tokens at init; a plan of images knows it",
        ),
    },
    fits_batch=fits_batch,
    fits_sequence=fits_sequence,
    moments=moments,
    mean_active=lambda active, experts, settings: float(active),
)
class ExpertChoiceRouter(ThresholdRouter):
    """Every expert takes the q = T·a/N tokens of the batch that give it the largest part of their softmax: loads are exactly equal,
    without a loss. A token has between none and all N experts, a on average, and its weights are those parts, not renormalised.

    Whether an expert takes a token depends on the tokens after it. That is no matter for images, and a leak in a causal language
    model: its training loss profits from it. In evaluation an expert therefore takes each token whose part reaches a threshold,
    an average over past steps of the q-th largest part (the paper leaves causal use open; this form is ours). Before the first
    step there is no threshold, and each token takes its a best experts.

    With ``within = "sequence"`` an expert takes L·a/N tokens of every sequence (of every image: EC-DiT, 2410.02098), in evaluation as in
    training, so that what comes of a sequence does not depend on what else is in its batch.
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes a batch: P = N·q pairs from the batch, or as many as pass the thresholds.

        Raises:
            ValueError: fewer tokens than N/a, where they are chosen from the batch.
        """
        logit_TN = self.logits(x_TD)
        score_TN = torch.softmax(logit_TN, dim=1)
        if self.options.settings["within"] == SEQUENCE:
            token_P, expert_P = self._from_sequences(score_TN)
        elif self.training or self.options.settings["evaluation"] == BY_BATCH:
            token_P, expert_P = self._from_batch(score_TN)
        else:
            token_P, expert_P = self._by_threshold(score_TN.detach()).nonzero().unbind(1)
        # one index instead of two, whose gradient takes ten times as long
        weight_P = score_TN.flatten().gather(0, token_P * self.experts + expert_P) * self.route_scale
        routing = Routing(token_P, expert_P, weight_P, len(x_TD), self.experts, slots=0, route_scale=self.route_scale)
        routing.scores_TN, routing.logits_TN = score_TN, logit_TN
        return with_stats(routing)

    @property
    def reads_batch(self) -> str:
        """Where tokens are chosen from the batch in evaluation, too."""
        settings = self.options.settings
        if settings["within"] == SEQUENCE or settings["evaluation"] != BY_BATCH:
            return ""
        return 'evaluation = "batch" of expert-choice takes them by the whole batch: say within = "sequence", or evaluation = "threshold"'

    def _from_batch(self, score_TN: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of each expert with the tokens it takes, one expert after the other; tells the thresholds."""
        fits_batch(self.active, self.experts, {}, len(score_TN))
        count = round(len(score_TN) * self.active / self.experts)
        token_NQ = take_top(score_TN, count)
        if count:
            self.observe(score_TN.detach().t().gather(1, token_NQ).amin(1))
        expert_NQ = torch.arange(self.experts, device=score_TN.device)[:, None].expand(-1, count)
        return token_NQ.flatten(), expert_NQ.flatten()

    def _from_sequences(self, score_TN: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of each expert with the tokens it takes of each sequence."""
        if self.sequence is None:
            raise ValueError(
                'within = "sequence" needs sequences: call the layer with x of shape (sequences, tokens, width)'
            )
        N, L = self.experts, self.sequence
        fits_sequence(self.active, N, self.options.settings, L)
        count = L * self.active // N
        # every expert of every sequence is a column of its own
        score_LX = score_TN.view(-1, L, N).transpose(0, 1).reshape(L, -1)
        token_XQ = take_top(score_LX, count)
        column_X1 = torch.arange(len(token_XQ), device=score_TN.device)[:, None]
        token_XQ = token_XQ + column_X1.div(N, rounding_mode="floor") * L
        return token_XQ.flatten(), (column_X1 % N).expand(-1, count).flatten()

    def _by_threshold(self, score_TN: Tensor) -> Tensor:
        """(T, N) bool, each row a function of its own token alone."""
        if not self.steps:
            best_TK = select_top(score_TN, self.active)
            return torch.zeros_like(score_TN, dtype=torch.bool).scatter_(1, best_TK, True)
        return score_TN >= self.threshold
