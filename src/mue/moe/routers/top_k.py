"""The standard router: sigmoid or softmax scores, top-a, weights normalised over the active experts.

Shape suffixes: T tokens, D width, N experts, G groups, K active experts per token, P = T*K pairs.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.moe.backends import native_route as route
from mue.moe.losses import balance_bias_step, load_balance_loss, router_z_loss
from mue.moe.routing import Routing, routing_stats

Score = Literal["sigmoid", "softmax"]
Gates = Literal["normalised", "measured"]


def check_counts(experts: int, active: int, groups: int) -> None:
    """Raises ValueError, naming the numbers and the fix, unless `active` of `experts` in `groups` can be selected."""
    if experts < 1 or active < 1 or groups < 1:
        raise ValueError(f"experts={experts}, active={active}, groups={groups} must all be at least 1")
    if active > experts:
        raise ValueError(f"active={active} exceeds experts={experts}: use at most {experts} active, or more experts")
    for name, number in (("experts", experts), ("active", active)):
        if number % groups:
            raise ValueError(
                f"groups={groups} does not divide {name}={number}: each group selects active/groups of its "
                f"experts/groups; use a divisor of {math.gcd(experts, active)}"
            )


def select_top(score_TN: Tensor, active: int, groups: int = 1) -> Tensor:
    """The `active` best experts of each token, `active/groups` inside each group of consecutive experts.

    Equal scores go to the lower expert index, on every device: torch.topk leaves ties open, so it is given integers
    without ties. A float32 reads as an integer of the same order once the magnitude bits of negatives are flipped;
    the index goes below it.

    Args:
        score_TN: (T, N); compared in float32.

    Returns:
        (T, active) int64, by group and then by falling score.
    """
    if (best_TK := route.select_top(score_TN.detach(), active, groups)) is not None:
        return best_TK
    tokens, experts = score_TN.shape
    bits_TN = (score_TN.detach().float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    bits_TN = bits_TN ^ ((bits_TN >> 31) & 0x7FFFFFFF)
    rank_N = torch.arange(experts - 1, -1, -1, device=score_TN.device)
    key_TN = bits_TN.long() * experts + rank_N
    size = experts // groups
    best = key_TN.view(tokens, groups, size).topk(active // groups, dim=2).indices
    if groups > 1:
        best = best + torch.arange(0, experts, size, device=best.device)[:, None]
    return best.reshape(tokens, active)


class Router(nn.Module):
    """Scores every expert for every token and keeps the best.

    `weight` (N, D) is the only parameter, its fan-in is D. `balance_bias` (N,) float32 is a buffer that is added to
    the scores for the selection only and moves by `update_bias_` (aux-loss-free balancing, arXiv 2408.15664); `load`
    (N,) int64 counts pairs per expert in training mode since its last move. Both are in the state dict, so that a
    resumed run is exact.

    Everything runs in float32 (float64 for float64 input), also under autocast.

    Args:
        width: D.
        experts: N.
        active: a, experts per token.
        groups: g; a/g experts are selected inside each group of N/g, the weights are still normalised over all a
            (conventions.md 9: globally; per group they would sum to g).
        score: "sigmoid" or "softmax".
        normalize: divide the weights by their sum over the active experts, so that they sum to the route scale.
        gates: "normalised" (the rule's assumption) or "measured" (the plan corrects for measured moments).
        route_scale: R, multiplied into the weights.
        balance_loss, z_loss: put the named loss, without coefficient, into `Routing.losses`.

    Raises:
        ValueError: a > N; g divides not N or not a; R not positive and finite; weights that are not normalised
            without gates="measured".
    """

    balance_bias: Tensor
    load: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        groups: int = 1,
        *,
        score: Score = "sigmoid",
        normalize: bool = True,
        gates: Gates = "normalised",
        route_scale: float = 1.0,
        balance_loss: bool = False,
        z_loss: bool = False,
    ) -> None:
        super().__init__()
        check_counts(experts, active, groups)
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f'score={score!r} is unknown: use "sigmoid" or "softmax"')
        if gates not in ("normalised", "measured"):
            raise ValueError(f'gates={gates!r} is unknown: use "normalised" or "measured"')
        if not (math.isfinite(route_scale) and route_scale > 0):
            raise ValueError(f"route_scale={route_scale} must be positive and finite; the rule's value is {active}")
        if not normalize and gates != "measured":
            raise ValueError(
                f"{score} gates without normalisation do not sum to one over the active experts, which breaks the "
                f'rule silently: use normalize=True, or gates="measured" and a plan made from gate_moments'
            )
        if active == 1 and experts > 1 and normalize:
            warnings.warn(
                "one active expert with normalised gates: the weight is always 1, so the task loss gives the router no "
                "gradient. Use at least 2 active experts, or normalize=False with gates='measured'",
                stacklevel=2,
            )
        self.width, self.experts, self.active, self.groups = width, experts, active, groups
        self.score, self.normalize, self.gates, self.route_scale = score, normalize, gates, float(route_scale)
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("balance_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A plain start; the plan draws the real one."""
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        """The numbers, in the order of the signature."""
        return (
            f"width={self.width}, experts={self.experts}, active={self.active}, groups={self.groups}, "
            f"score={self.score}, normalize={self.normalize}, gates={self.gates}, route_scale={self.route_scale:g}"
        )

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, width), any float dtype.

        Returns:
            P = T*active pairs, token-major; weights in float32 and scaled by R.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logit_TN = F.linear(x_TD.to(dtype), self.weight.to(dtype))
            return self._route(logit_TN)

    def _route(self, logit_TN: Tensor) -> Routing:
        score_TN = torch.sigmoid(logit_TN) if self.score == "sigmoid" else torch.softmax(logit_TN, dim=1)
        expert_TK = select_top(score_TN.detach() + self.balance_bias, self.active, self.groups)
        weight_TK = self._weights(logit_TN, score_TN, expert_TK)
        routing = Routing.from_topk(expert_TK, weight_TK, self.experts, route_scale=self.route_scale, stats=False)
        routing.stats = route.routing_stats(routing) or routing_stats(routing)
        load_N = routing.stats["load"]
        if self.training:
            with torch.no_grad():
                self.load += load_N
        if self.balance_loss:
            prob_TN = score_TN if self.score == "softmax" else torch.softmax(F.logsigmoid(logit_TN), dim=1)
            routing.losses["load_balance"] = load_balance_loss(prob_TN, load_N)
        if self.z_loss:
            routing.losses["router_z"] = router_z_loss(logit_TN)
        return routing

    def _weights(self, logit_TN: Tensor, score_TN: Tensor, expert_TK: Tensor) -> Tensor:
        """(T, K), scaled by R."""
        if not self.normalize:
            return score_TN.gather(1, expert_TK) * self.route_scale
        sigmoid = self.score == "sigmoid"
        if (weight_TK := route.gates(logit_TN, expert_TK, sigmoid, self.route_scale)) is not None:
            return weight_TK
        # s_i / sum s = softmax(log s): the same weights, and no 0/0 where every sigmoid underflows.
        picked_TK = logit_TN.gather(1, expert_TK)
        return torch.softmax(F.logsigmoid(picked_TK) if sigmoid else picked_TK, dim=1) * self.route_scale

    @torch.no_grad()
    def update_bias_(self, speed: float) -> None:
        """Moves `balance_bias` by one step against the load since the last call, and forgets that load.

        Call it once per optimizer step. Under data parallelism sum `load` over the ranks first.
        """
        self.balance_bias += balance_bias_step(self.load, speed)
        self.load.zero_()
