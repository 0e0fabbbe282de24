"""UniPool-lock: a pool that all layers may use at first, and of which each expert belongs to one layer in the end (2605.06665).

Shape suffixes: T tokens, L layers that read a pool, N experts of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.common import one_of_all
from mue.moe.routers.unipool import FACTS, PoolLoad, UniPoolRouter
from mue.moe.routing import Routing
from mue.shapes.settings import Setting

MEMORY = 0.99  # of a layer's load that is remembered from step to step, until the pool is shared out


@router(
    "unipool-lock",
    place=11,
    **FACTS
    | {
        "settings": {
            **FACTS["settings"],
            "open_steps": Setting(default=1000, low=1, meaning="steps in which every layer may use the whole pool"),
            "fade_steps": Setting(default=1000, low=1, meaning="steps in which a layer loses other layers' experts"),
            "layer_experts": Setting(
                default=8.0, low=1.0, meaning="experts that a layer is drawn to use while the pool is open"
            ),
        },
        "losses": {**FACTS["losses"], "cardinality": 5e-3},
    },
    owned=True,
)
class UniPoolLockRouter(UniPoolRouter):
    """UniPool's router in three stages, by the count of optimizer steps.

    1. ``open_steps``: every layer uses the whole pool, and the loss ``cardinality`` draws it to ``layer_experts`` of them.
    2. The pool is shared out (:func:`owners`): N/L experts for each layer. In ``fade_steps`` the scores of the others fall to 0 along
       half a cosine.
    3. A layer uses its own experts alone, as in any MoE. The logits of the others stay in the norm.
    """

    @classmethod
    def shared(cls, routers: Sequence[UniPoolRouter]) -> PoolLock:
        """The load of every pool, and who owns its experts."""
        return PoolLock(routers)

    def access(self, unit_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """Other layers' experts count less and less, and are chosen last in the end."""
        if not isinstance(self.common, PoolLock):
            return unit_TN, None
        open_N = self.common.access(self).to(unit_TN.dtype)
        # below all that a logit over the norm can be, where nothing of an expert is left
        return F.relu(unit_TN) * open_N + unit_TN.clamp(max=0) - 2.0 * (open_N == 0), open_N

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """UniPool's, with what its own loss reads."""
        routing = super().forward(x_TD, given)
        if isinstance(self.common, PoolLock):
            routing.stats["cardinality_weight"] = self.common.weight(self)
            routing.stats["cardinality_target"] = routing.weight_P.new_tensor(
                math.log(self.options.settings["layer_experts"])
            )
        return routing


class PoolLock(PoolLoad):
    """:class:`PoolLoad`, how far training is, what each layer used so far, and whose every expert is.

    Buffers beside its: `step`; of every pool `used_0` (L, N), a running mean of each layer's shares, and `owner_0` (N,), the
    number of the layer among the pool's, -1 before the pool is shared out.
    """

    step: Tensor

    def __init__(self, routers: Sequence[UniPoolRouter]) -> None:
        super().__init__(routers)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        for pool, readers in self.readers.items():
            one_of_all(readers, ("open_steps", "fade_steps"), "or each a pool of its own")
            experts = readers[0].experts
            self.register_buffer(f"used_{pool}", torch.zeros(len(readers), experts))
            self.register_buffer(f"owner_{pool}", torch.full((experts,), -1))

    def access(self, one: UniPoolRouter) -> Tensor:
        """(N,) what is left to a layer of every expert's score, from 1 to 0."""
        settings = one.options.settings
        faded = ((self.step - settings["open_steps"]) / settings["fade_steps"]).clamp(0, 1)
        mine_N = self._of("owner", one.options.pool) == self._number(one)
        return torch.where(mine_N, 1.0, 0.5 + 0.5 * torch.cos(math.pi * faded))

    def weight(self, one: UniPoolRouter) -> Tensor:
        """The part of the cardinality loss that is one layer's, from 0 on rising while the pool is open, then 0 again."""
        opened = one.options.settings["open_steps"]
        return torch.where(self.step < opened, self.step / opened, 0.0) / len(self.readers[one.options.pool])

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Counts the step, remembers what layers used, and shares the pools out when their time has come."""
        self.step += 1
        super().end_step_(bias_speed)
        for pool, readers in self.readers.items():
            if int(self.step) == readers[0].options.settings["open_steps"]:
                self._of("owner", pool).copy_(owners(self._of("used", pool)))

    def take_over(self, pool: int, share_LN: Tensor) -> None:
        """Every layer's own shares, too."""
        super().take_over(pool, share_LN)
        self._of("used", pool).lerp_(share_LN.to(self._of("used", pool).dtype), 1 - MEMORY)

    def _of(self, name: str, pool: int) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}_{pool}"))

    def _number(self, one: UniPoolRouter) -> int:
        return next(i for i, other in enumerate(self.readers[one.options.pool]) if other is one)


def owners(value_LN: Tensor) -> Tensor:
    """Each expert's layer, N/L experts a layer, so that the sum of ``value_LN`` over owners is as large as it can be.

    From the experts in their order, experts are handed round circles of layers as long as that raises the sum. Without such a
    circle it is the largest (Klein, 1967, "A primal method for minimal cost flows").

    Args:
        value_LN: what an expert is worth to a layer.

    Returns:
        (N,) int64.
    """
    value_LN = value_LN.double().cpu()
    layers, experts = value_LN.shape
    owner_N = torch.arange(experts) // (experts // layers)
    while (circle := _circle(value_LN, owner_N)) is not None:
        for expert, layer in circle:
            owner_N[expert] = layer
    return owner_N


def _circle(value_LN: Tensor, owner_N: Tensor) -> list[tuple[int, int]] | None:
    """(expert, its new layer) of a circle of layers that raises the sum, by the longest paths between layers (Floyd); None without one."""
    layers = len(value_LN)
    gain_LL, mover_LL = torch.full((layers, layers), -math.inf, dtype=torch.float64), torch.zeros(layers, layers).long()
    for layer in range(layers):
        mine = (owner_N == layer).nonzero()[:, 0]
        gain_LL[layer], best = (value_LN[:, mine] - value_LN[layer, mine]).max(1)
        mover_LL[layer] = mine[best]
    gain_LL.fill_diagonal_(-math.inf)  # a circle of one layer is none
    path_LL, next_LL = gain_LL.clone(), torch.arange(layers).expand(layers, layers).clone()
    enough = 1e-12 * max(
        float(value_LN.abs().max()), 1e-300
    )  # above rounding, or two equal ones would go round for ever
    for k in range(layers):
        longer_LL = path_LL[:, k, None] + path_LL[None, k] > path_LL + enough
        path_LL = torch.where(longer_LL, path_LL[:, k, None] + path_LL[None, k], path_LL)
        next_LL = torch.where(longer_LL, next_LL[:, k, None].expand_as(next_LL), next_LL)
        found = (path_LL.diagonal() > enough).nonzero()
        if len(found):
            start = at = int(found[0])
            circle: list[tuple[int, int]] = []
            while not circle or at != start:
                to = int(next_LL[at, start])
                circle.append((int(mover_LL[at, to]), to))
                at = to
            return circle
    return None
