"""Random routing: a of N experts drawn anew for every token.

What a learned router has to beat; 2110.04260 finds ones that do not.

Shape suffixes: T tokens, N experts, K active experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.base import BaseRouter, RouterInput, router
from mue.moe.routers.draws import uniform
from mue.moe.routers.ops import select_top
from mue.moe.routing import Routing

EVALUATION = -1  # stands for the step in evaluation, where every pass over a batch draws the same


class DrawingRouter(BaseRouter):
    """A router that draws: it counts optimizer steps in a buffer, so that a draw is a function of seed, layer, step and place.

    So a recomputed forward pass, a resumed run and a stacked variant draw what they would have drawn.
    """

    step: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """The next step draws anew."""
        self.step += 1

    def keys(self, given: RouterInput | None) -> tuple[int | Tensor, ...]:
        """What a draw of this pass depends on, but for the token's place in the batch and the expert."""
        step, draw = (self.step, given.draw if given else 0) if self.training else (EVALUATION, 0)
        return self.options.seed, self.options.layer, step, draw

    @property
    def reads_batch(self) -> str:
        """Where evaluation draws by places."""
        return f"{self.kind.name} draws them by the token's place in the batch: take another router"

    def drawn(self, tokens: int, keys: tuple[int | Tensor, ...], device: torch.device) -> Tensor:
        """(T, K) experts, uniformly without replacement, a/g inside each group: those with the highest of N uniform numbers."""
        place_T1 = torch.arange(tokens, device=device)[:, None]
        expert_N = torch.arange(self.experts, device=device)
        # the a largest of N independent keys are a uniform choice without replacement, by one sort
        return select_top(uniform(*keys, place_T1, expert_N, device=device), self.active, self.groups)


@router("random", place=3, even=True, stochastic=True)
class RandomRouter(DrawingRouter):
    """a of N experts for every token of every step, each with weight R/a.

    In evaluation a draw depends on the token's place in the batch alone.
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes by the tokens' places in the batch."""
        return self.even(self.drawn(x_TD.shape[0], self.keys(given), x_TD.device), x_TD.dtype)
