"""Hash layers: the experts of a token are fixed by its id (Roller et al., 2106.04426). The control without learning.

Shape suffixes: T tokens, K active experts per token, G groups, S experts of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mue.moe.routers.base import BaseRouter, RouterInput, router
from mue.moe.routers.draws import bits
from mue.moe.routing import Routing


@router("hash", place=2, even=True, needs_tokens=True)
class HashRouter(BaseRouter):
    """The same a of N experts for every token of an id, each with weight R/a; other ones in every layer and for every seed.

    Balanced over ids: any N/g consecutive ids that begin at a multiple of N/g give each expert exactly a of their pairs.
    (The load of a text is as uneven as its words are; the paper's balanced table needs their frequencies.)
    """

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes by ``given.tokens``.

        Raises:
            ValueError: no token ids were given.
        """
        if given is None or given.tokens is None:
            raise ValueError(
                "the hash router reads token ids: call the layer with RouterInput(tokens), ids in the leading shape of x"
            )
        return self.even(self.experts_of(given.tokens), x_TD.dtype)

    def experts_of(self, token_T: Tensor) -> Tensor:
        """(T, K) the experts of these ids.

        Ids are taken in runs of S = N/g. Each run has a random order of every group's experts, and the id at place p of its
        run takes the a/g experts from place p on: so nobody is left out of a run, and no table of the vocabulary is kept.
        """
        size, each, device = self.experts // self.groups, self.active // self.groups, token_T.device
        run_T11, place_T11 = (token_T // size)[:, None, None], (token_T % size)[:, None, None]
        expert_GS = torch.arange(self.experts, device=device).view(self.groups, size)
        key_TGS = bits(self.options.seed, self.options.layer, run_T11, expert_GS, device=device)
        turn_TGK = (place_T11 + torch.arange(each, device=device)) % size
        chosen_TGK = key_TGS.argsort(-1).gather(-1, turn_TGK.expand(-1, self.groups, -1))
        return (chosen_TGK + expert_GS[:, :1]).flatten(1)
