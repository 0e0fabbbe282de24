"""A MoE block of stacked variants: variants × experts are just more groups of one grouped product.

Routing stays a loop over the variants, each with its own router (its buffers, seed and step included): routers are what
research changes, and whatever one does, it does here too.

Shape suffixes: V variants, T tokens, D width, N experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mue.lab.models.ops import project
from mue.moe import ExpertPool, ExpertWeights, MoELayer, Routing, experts
from mue.moe.routers.base import RouterInput


class StackedMoE(nn.Module):
    """The parameters of a :class:`MoELayer` under the same names, each with a leading axis of variants.

    Attributes:
        layers: the block of each variant on its own; its router's buffers (bias, load) are the ones in use.
    """

    pool: ExpertPool | None

    def __init__(self, template: MoELayer, variants: int) -> None:
        super().__init__()
        self.router = template.router
        self.experts_gate, self.experts_up, self.experts_down = (
            template.experts_gate, template.experts_up, template.experts_down,
        )  # fmt: skip
        self.shared_gate, self.shared_up, self.shared_down = (
            template.shared_gate, template.shared_up, template.shared_down,
        )  # fmt: skip
        self.__dict__["pool"] = template.pool  # the model's, as in the layer: stacked where it lies
        self.output_multiplier, self.backend = template.output_multiplier, template.backend
        self.layers = [template] * variants

    def forward(self, x: Tensor, given: RouterInput | None = None) -> tuple[Tensor, Routing]:
        """(V, ..., D) → the same shape, and one routing whose losses (V,) and parts are the variants' own."""
        x_VTD = x.flatten(1, -2)
        routing = self._route(x_VTD, given, x.shape[-2] if x.dim() > 3 else None)
        y_VTD = None
        own = self.experts_gate, self.experts_up, self.experts_down
        gate, up, down = own if self.pool is None else self.pool.matrices
        if up is not None and down is not None:
            weights = ExpertWeights(None if gate is None else gate.flatten(0, 1), up.flatten(0, 1), down.flatten(0, 1))
            y_VTD = experts(x_VTD.flatten(0, 1), routing, weights, backend=self.backend).view(x_VTD.shape)
        if self.shared_up is not None and self.shared_down is not None:
            up = project(x_VTD, self.shared_up)
            hidden = F.gelu(up) if self.shared_gate is None else F.silu(project(x_VTD, self.shared_gate)) * up
            shared = project(hidden, self.shared_down)
            y_VTD = shared if y_VTD is None else y_VTD + shared
        assert y_VTD is not None
        return (y_VTD * self.output_multiplier).view(x.shape), routing

    def _route(self, x_VTD: Tensor, given: RouterInput | None, sequence: int | None) -> Routing:
        """Every variant's own routing as one: token t of variant v is token v·T + t, expert e is v·N + e."""
        variants, tokens, _ = x_VTD.shape
        if self.router is None:
            return Routing.empty(variants * tokens, device=x_VTD.device)
        stacked = {name: parameter.unbind(0) for name, parameter in self.router.named_parameters()}
        each = []
        for v, (layer, x_TD) in enumerate(zip(self.layers, x_VTD.unbind(0), strict=True)):
            assert layer.router is not None
            own = {name: parameters[v] for name, parameters in stacked.items()}
            also = None if given is None else given.variant(v)
            each.append(functional_call(layer.router, own, (x_TD, also, sequence)))
        each = with_equal_slots(each)
        number, first = each[0].num_experts, each[0]
        expert_P = [
            # padding is marked by the number of experts, which is another one in the stack
            torch.where(r.expert_P == number, variants * number, r.expert_P + v * number)
            for v, r in enumerate(each)
        ]
        return Routing(
            torch.cat([r.token_P + v * tokens for v, r in enumerate(each)]),
            torch.cat(expert_P),
            torch.cat([r.weight_P for r in each]),
            variants * tokens,
            variants * number,
            first.slots,
            route_scale=first.route_scale,
            losses={name: torch.stack([r.losses[name] for r in each]) for name in first.losses},
            parts=tuple(each),
        )


def with_equal_slots(routings: list[Routing]) -> list[Routing]:
    """Routings of equally many tokens, padded to as many slots as the widest has: one table holds pairs of them all."""
    widest = max(routing.slots for routing in routings)
    return [routing if routing.slots == widest else _padded(routing, widest) for routing in routings]


def _padded(routing: Routing, slots: int) -> Routing:
    more = 0, slots - routing.slots
    expert_TK, weight_TK = (x.view(-1, routing.slots) for x in (routing.expert_P, routing.weight_P))
    padded = Routing.from_topk(
        F.pad(expert_TK, more, value=routing.num_experts), F.pad(weight_TK, more), routing.num_experts, stats=False
    )
    return replace(routing, token_P=padded.token_P, expert_P=padded.expert_P, weight_P=padded.weight_P, slots=slots)
