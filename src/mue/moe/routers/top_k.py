"""The standard routers: sigmoid or softmax scores, top-a, weights normalised over the active experts.

Shape suffixes: T tokens, D width, N experts, K active experts per token, P = T*K pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mue.moe.losses import balance_bias_step
from mue.moe.routers.base import ROUTER_CLASSES, RouterInput, RouterOptions
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.ops import normalised_gates, select_top
from mue.moe.routing import Routing
from mue.shapes.block import MEASURED, NORMALISED, Block
from mue.shapes.routers import ROUTERS

Score = Literal["sigmoid", "softmax"]


class TopKRouter(MatrixRouter):
    """Scores every expert for every token and keeps the best (Switch, 2101.03961; sigmoid scores: DeepSeek-V3, 2412.19437).

    What is here is the same for every router that chooses by score; one that chooses in another way overrides :meth:`select`.

    `weight` (N, D) is the only parameter, its fan-in is D. `balance_bias` (N,) float32 is a buffer that is added to
    the scores for the selection only and moves by `update_bias_` (aux-loss-free balancing, arXiv 2408.15664); `load`
    (N,) int64 counts pairs per expert in training mode since its last move. Both are in the state dict, so that a
    resumed run is exact.

    Everything runs in float32 (float64 for float64 input), also under autocast: rounded logits would move the selection.

    Args:
        width: D.
        experts: N.
        active: a, experts per token.
        groups: g; a/g experts are selected inside each group of N/g, the weights are still normalised over all a
            (globally; per group they would sum to g).
        options: see `RouterOptions`.
        score: "sigmoid" or "softmax".
        normalize: divide the weights by their sum over the active experts, so that they sum to the route scale.
        gates: "unit-sum" (the rule's assumption) or "measured" (the plan corrects for measured moments).

    Raises:
        ValueError: what `BaseRouter` refuses; weights that are not normalised without gates="measured".
    """

    balance_bias: Tensor
    load: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        groups: int = 1,
        options: RouterOptions | None = None,
        *,
        score: Score = "sigmoid",
        normalize: bool = True,
        gates: str = NORMALISED,
    ) -> None:
        super().__init__(width, experts, active, groups, options)
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f'score={score!r} is unknown: use "sigmoid" or "softmax"')
        if gates not in (NORMALISED, MEASURED):
            raise ValueError(f"gates={gates!r} is unknown: use {NORMALISED!r} or {MEASURED!r}")
        if not self.kind.sums_to_one(normalize, self.options.settings) and gates != MEASURED:
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
        self.score, self.normalize, self.gates = score, normalize, gates
        self.register_buffer("balance_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64))

    @classmethod
    def from_block(cls, block: Block, width: int, options: RouterOptions) -> TopKRouter:
        """The router of a block, whose setting ``score`` is the score."""
        score = block.all_settings["score"]
        numbers = block.experts, block.active, block.groups
        return cls(width, *numbers, options, score=score, normalize=block.normalize, gates=block.gates)

    def extra_repr(self) -> str:
        """The numbers, in the order of the signature."""
        return f"{super().extra_repr()}, score={self.score}, normalize={self.normalize}, gates={self.gates}"

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens by their hidden states alone: P = T*active pairs, token-major."""
        logit_TN = self.logits(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(logit_TN, given)

    def select(self, choice_TN: Tensor, active: int, given: RouterInput | None) -> Tensor:
        """(T, active) which experts: the best.

        Args:
            choice_TN: scores with the bias, without gradient. given: see :meth:`forward`.
        """
        return select_top(choice_TN, active, self.groups)

    def _route(self, logit_TN: Tensor, given: RouterInput | None) -> Routing:
        """Selection by score and bias, weights by score alone."""
        score_TN = torch.sigmoid(logit_TN) if self.score == "sigmoid" else torch.softmax(logit_TN, dim=1)
        active, factor = self.in_use
        factor *= self.route_scale
        # the bias selects and does not weigh: in the weights it would move the output (2408.15664)
        choice_TN = score_TN.detach() + self.balance_bias
        expert_TK = self.select(choice_TN, active, given)
        if self.normalize or active == self.active:
            weight_TK = self._weights(logit_TN, score_TN, expert_TK, factor)
        else:
            # scores of more experts sum to more by themselves: they are taken to the sum that the trained number has
            trained_TK = score_TN.gather(1, self.select(choice_TN, self.active, given))
            weight_TK = normalised_gates(logit_TN, expert_TK, self.score, factor) * trained_TK.sum(1, keepdim=True)
        routing = self.routing(expert_TK, weight_TK)
        routing.scores_TN, routing.logits_TN = score_TN, logit_TN
        if self.training:
            with torch.no_grad():
                # in training only: a validation pass must not move the bias of the next step
                self.load += routing.stats["load"]
        return routing

    def _weights(self, logit_TN: Tensor, score_TN: Tensor, expert_TK: Tensor, scale: float) -> Tensor:
        """(T, K), times ``scale``."""
        if self.normalize:
            return normalised_gates(logit_TN, expert_TK, self.score, scale)
        # gates = "measured": R is ā/m1 then, made for these very weights (docs/why/index.md#gates)
        return score_TN.gather(1, expert_TK) * scale

    @torch.no_grad()
    def update_bias_(self, speed: float) -> None:
        """Moves `balance_bias` by one step, in units of the score, against the load since the last call, and forgets that load.

        Call it once per optimizer step. Under data parallelism sum `load` over the ranks first.
        """
        self.balance_bias += balance_bias_step(self.load, speed)
        self.load.zero_()

    def end_step_(self, bias_speed: float) -> None:
        """Moves the balance bias, where that is how this router is balanced.

        Args:
            bias_speed: one step for sigmoid scores, which begin at ½. Softmax scores begin at 1/N, and their step is as much smaller:
                the sigmoid's own 0.01 is two thirds of a score of 64 experts and hides what the router says (docs/findings/gates.md).
        """
        if self.options.balance == "bias":
            self.update_bias_(bias_speed if self.score == "sigmoid" else bias_speed * 2 / self.experts)


@ROUTER_CLASSES.register("sigmoid", place=0)
@ROUTER_CLASSES.register("softmax", place=1)
class Router(TopKRouter):
    """The standard routers, by their numbers alone: the a best by sigmoid or softmax scores.

    Args:
        width, experts, active, groups, score, normalize, gates: see `TopKRouter`.
        options: any of `RouterOptions` (route_scale, balance, z_loss, settings, ...).
    """

    kind = ROUTERS["sigmoid"]  # of an instance: that of its score

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        groups: int = 1,
        *,
        score: Score = "sigmoid",
        normalize: bool = True,
        gates: str = NORMALISED,
        **options: Any,
    ) -> None:
        if score in ("sigmoid", "softmax"):
            self.kind = ROUTERS.lookup(score)  # before its settings are read
        numbers = width, experts, active, groups
        super().__init__(*numbers, RouterOptions(**options), score=score, normalize=normalize, gates=gates)

    @classmethod
    def from_block(cls, block: Block, width: int, options: RouterOptions) -> Router:
        """The router of a block, whose `router` is the score."""
        return cls(
            width,
            block.experts,
            block.active,
            block.groups,
            score=cast(Score, block.router),
            normalize=block.normalize,
            gates=block.gates,
            **{f.name: getattr(options, f.name) for f in fields(options)},
        )
