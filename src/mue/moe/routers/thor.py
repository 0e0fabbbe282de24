"""THOR: one random expert of a layer for a whole batch (Zuo et al., "Taming sparsely activated Transformer with stochastic
experts", 2110.04260).

The paper trains with two passes over every batch and pulls their predictions together (its consistency loss, which is the
model's to compute: :func:`mue.moe.losses.consistency_loss`). Its MoE layers take turns with dense ones: a ``Mixed`` shape.

Shape suffixes: T tokens, K = 1 active expert per token.
"""

from __future__ import annotations

from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.draws import bits
from mue.moe.routers.random import DrawingRouter
from mue.moe.routing import Routing


@router("thor", place=4, even=True, stochastic=True, active=1, grouped=False)
class ThorRouter(DrawingRouter):
    """In training every token of a pass goes to the same expert, drawn anew for each layer, step and pass.

    In evaluation an expert is drawn for every token (the default of the authors' code, ``inference_level=0``
    of microsoft/Stochastic-Mixture-of-Experts), here by the token's place in the batch alone, so that it can be repeated.
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes the batch as a whole, or in evaluation by the tokens' places in it."""
        tokens, keys = x_TD.shape[0], self.keys(given)
        if not self.training:
            return self.even(self.drawn(tokens, keys, x_TD.device), x_TD.dtype)
        expert = bits(*keys, device=x_TD.device) % self.experts
        return self.even(expert.expand(tokens, 1), x_TD.dtype)
