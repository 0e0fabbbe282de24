# ruff: noqa: N815 (shape suffixes in field names)
"""What a router returns: which token goes to which expert with which weight, as flat unsorted pairs.

Top-k, top-p (ragged) and expert choice are one thing in this form.
Nothing here sorts; only `mue.moe.experts` does.

Shape suffixes: T tokens, P pairs, K slots per token, N experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Routing:
    """Flat (token, expert, weight) pairs, token-major and unsorted.

    Attributes:
        token_P: (P,) int64, the token of each pair, in [0, num_tokens).
        expert_P: (P,) int64, the expert of each pair, in [0, num_experts]; `num_experts` itself marks padding.
        weight_P: (P,) float, the combine weight, differentiable, **with the route scale already in it**;
            0 where the pair is padding.
        num_tokens: T.
        num_experts: N.
        slots: pairs per token when every token has exactly that many, consecutively (top-k: k; ragged: the padded
            k_max); 0 when tokens have differing numbers of pairs (expert choice, P = N * capacity).
        route_scale: the R inside weight_P, kept so that `gate_moments` can divide it out again.
        losses: named auxiliary losses, scalars with their coefficients; only those that the run asked for (``load_balance``,
            ``router_z``) are without, for the trainer has them (``mue.moe.routers.base.RouterOptions``).
        scores_TN: (T, N) float, the router's probabilities or affinities, with their gradient, where it has any to train.
        logits_TN: (T, N) float, what they were made of.
        sequence: tokens of one sequence, where they come in sequences of equal length, one after the other.
        stats: named detached measurements, see `routing_stats`.
        parts: of stacked variants, the routing of each on its own.
    """

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    num_tokens: int
    num_experts: int
    slots: int
    route_scale: float = 1.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    scores_TN: Tensor | None = None
    logits_TN: Tensor | None = None
    sequence: int | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[Routing, ...] = ()

    def __post_init__(self) -> None:
        shapes = {tuple(self.token_P.shape), tuple(self.expert_P.shape), tuple(self.weight_P.shape)}
        if len(shapes) != 1 or self.token_P.dim() != 1:
            raise ValueError(
                f"token_P, expert_P and weight_P must be flat and of one length, got {tuple(self.token_P.shape)}, "
                f"{tuple(self.expert_P.shape)}, {tuple(self.weight_P.shape)}: flatten them token-major"
            )
        if self.token_P.dtype != torch.int64 or self.expert_P.dtype != torch.int64:
            raise ValueError(f"token_P and expert_P must be int64, got {self.token_P.dtype} and {self.expert_P.dtype}")
        if self.slots and self.num_pairs != self.num_tokens * self.slots:
            raise ValueError(
                f"slots={self.slots} promises {self.num_tokens} * {self.slots} = {self.num_tokens * self.slots} pairs, "
                f"got {self.num_pairs}: pad ragged tokens with expert={self.num_experts} and weight 0, or give slots=0"
            )

    @property
    def num_pairs(self) -> int:
        """P, padding included."""
        return int(self.token_P.shape[0])

    @cached_property
    def prob_TN(self) -> Tensor:
        """(T, N) the scores over their sum, made once for all losses that read them."""
        assert self.scores_TN is not None
        # where all of them underflow there is nothing to divide by, and nothing to train
        tiny = torch.finfo(self.scores_TN.dtype).tiny
        return self.scores_TN / self.scores_TN.sum(1, keepdim=True).clamp(min=tiny)

    @classmethod
    def empty(cls, num_tokens: int, num_experts: int = 0, device: torch.device | None = None) -> Routing:
        """No pairs at all: what a layer with only shared experts returns."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(none, none, torch.empty(0, device=device), num_tokens, num_experts, slots=0)

    @classmethod
    def from_topk(
        cls, expert_TK: Tensor, weight_TK: Tensor, num_experts: int, *, route_scale: float = 1.0, stats: bool = True
    ) -> Routing:
        """K pairs for each token, from (T, K) tables. weight_TK must already contain `route_scale`."""
        tokens, slots = expert_TK.shape
        token_P = torch.arange(tokens, device=expert_TK.device).repeat_interleave(slots, output_size=tokens * slots)
        routing = cls(
            token_P, expert_TK.reshape(-1), weight_TK.reshape(-1), tokens, num_experts, slots, route_scale=route_scale
        )
        if stats:
            routing.stats = routing_stats(routing)
        return routing


def expert_load(routing: Routing) -> Tensor:
    """(N+1,) pairs per expert, the last being padding; ValueError for an index outside [0, N]."""
    number = routing.num_experts
    if routing.num_pairs and int(routing.expert_P.min()) < 0:
        raise ValueError("expert_P holds a negative index: padding is marked by num_experts")
    load = torch.bincount(routing.expert_P, minlength=number + 1)
    if load.shape[0] > number + 1:
        raise ValueError(f"expert_P reaches {load.shape[0] - 1} but there are {number} experts (padding is {number})")
    return load


def counts(index_P: Tensor, number: int) -> Tensor:
    """(number,) int64: how often each of [0, number) stands in ``index_P``.

    Not bincount, whose result's size depends on the data: a GPU would be waited for, a compiled graph broken.
    """
    zero = torch.zeros(number, dtype=torch.int64, device=index_P.device)
    return zero.scatter_add_(0, index_P, torch.ones_like(index_P))


def _sum_per_token(routing: Routing, value_P: Tensor) -> Tensor:
    """(P,) -> (T,): the sum over each token's pairs."""
    if routing.slots:
        # consecutive by promise: a view, and a sum in a fixed order on every device
        return value_P.view(routing.num_tokens, routing.slots).sum(1)
    return value_P.new_zeros(routing.num_tokens).index_add_(0, routing.token_P, value_P)


@torch.no_grad()
def routing_stats(routing: Routing) -> dict[str, Tensor]:
    """Detached measurements of a routing; padding pairs count nowhere.

    Returns:
        load: (N,) int64, pairs per expert.
        load_min, load_max: the smallest and largest share of all pairs that one expert has (balanced: 1/N).
        gate_sum: mean over tokens of the sum of weights, route scale included.
        variance_factor: F = a * E[sum_i pi_i^2] with pi the weights divided by their sum per token: 1 for uniform
            weights, a for one-hot (docs/why/index.md#gates). `a` is the mean number of pairs per token; tokens whose
            weights sum to 0 are left out.
    """
    experts = routing.num_experts
    if experts == 0:
        return {}
    load_N = counts(routing.expert_P, experts + 1)[:experts]
    pairs = load_N.sum()
    share_N = load_N / pairs.clamp(min=1)
    weight_P = routing.weight_P.detach()
    sum_T, square_T = _sum_per_token(routing, weight_P), _sum_per_token(routing, weight_P.square())
    routed_T = sum_T != 0
    # π per token: F is about how even the weights of a token are, whatever they sum to (docs/why/index.md#gates)
    spread_T = torch.where(routed_T, square_T / torch.where(routed_T, sum_T, 1.0).square(), 0.0)
    tokens = routed_T.sum().clamp(min=1)
    return {
        "load": load_N,
        "load_min": share_N.min(),
        "load_max": share_N.max(),
        "gate_sum": sum_T.sum() / max(routing.num_tokens, 1),
        "variance_factor": pairs / tokens * (spread_T.sum() / tokens),
    }


@torch.no_grad()
def gate_moments(routing: Routing) -> tuple[float, float]:
    """(m1, m2): means over tokens of sum w and sum w^2, with the route scale divided out (docs/why/index.md#gates).

    They are what the plan needs under `gates = "measured"`: R = a/m1 and F = a*m2/m1^2.

    Raises:
        ValueError: there are no tokens to take a mean over.
    """
    if routing.num_tokens == 0:
        raise ValueError("gate moments need at least one token: route a batch that is not empty")
    weight_P = routing.weight_P.detach().double() / routing.route_scale
    return weight_P.sum().item() / routing.num_tokens, weight_P.square().sum().item() / routing.num_tokens
