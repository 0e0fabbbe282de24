"""The MoE block: y = A · (routed + shared).

Shape suffixes: T tokens, N experts, D width, H expert width, S width of all shared experts together.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts
from mue.moe.pool import ExpertPool, weight
from mue.moe.routers.base import BaseRouter, Common, RouterInput, RouterOptions, build
from mue.moe.routing import Routing
from mue.shapes.block import Block


class MoELayer(nn.Module):
    """Router, routed experts and shared experts (the block of Complete-muE, 2605.23893).

    Parameters: the router's own; `experts_gate`, `experts_up` (N, H, D) and `experts_down` (N, D, H); `shared_gate`,
    `shared_up` (S, D) and `shared_down` (D, S), S = shared_experts * shared_width. What a layer does not have (no routed
    experts, no shared ones, no gate) is not there as a parameter; nor are experts that lie in a `pool`.

    Args:
        width: D.
        router: which experts each token goes to, with which weights (R included); None for shared experts only.
        expert_width: h.
        shared_experts: n_s, always on.
        shared_width: h_s, of *one* shared expert; `expert_width` where not given.
        output_multiplier: A, on routed and shared alike; its place beside R and l^-α: ``mue.plan.values.Multipliers``.
        gated: SwiGLU; else gelu(up x).
        backend: see `mue.moe.experts`.
        pool: routed experts that other layers read, too. The layer then has none of its own and only reads these: the model owns
            them (`mue.moe.ExpertPool`).

    Raises:
        ValueError: nothing to compute, widths below 1, A not finite, a pool of other experts.
    """

    pool: ExpertPool | None

    def __init__(
        self,
        width: int,
        router: BaseRouter | None,
        expert_width: int,
        shared_experts: int = 0,
        shared_width: int | None = None,
        *,
        output_multiplier: float = 1.0,
        gated: bool = True,
        backend: str = "auto",
        pool: ExpertPool | None = None,
    ) -> None:
        super().__init__()
        if router is not None and not isinstance(router, BaseRouter):
            raise ValueError(
                f"router={router!r} is no router: give a mue.moe.Router(width, experts, active), or build the layer of a"
                " block with MoELayer.from_block"
            )
        shared_width = expert_width if shared_width is None else shared_width
        number = router.experts if router is not None else 0
        if shared_experts < 0 or number + shared_experts == 0:
            raise ValueError(f"experts={number}, shared_experts={shared_experts}: at least one expert is needed")
        if min(width, expert_width, shared_width) < 1:
            raise ValueError(f"width={width}, expert_width={expert_width}, shared_width={shared_width} must be >= 1")
        if not math.isfinite(output_multiplier):
            raise ValueError(f"output_multiplier={output_multiplier} must be finite")
        self.router = router
        self.width, self.expert_width = width, expert_width
        self.shared_experts, self.shared_width = shared_experts, shared_width
        self.output_multiplier, self.gated, self.backend = float(output_multiplier), gated, backend
        if pool is not None:
            _check_pool(pool, number, width, expert_width, gated)
        # past nn.Module, which would make it a part of every layer that reads it: the model alone owns it and has it once
        self.__dict__["pool"] = pool
        own, inner = number > 0 and pool is None, shared_experts * shared_width
        self.experts_gate = weight(own and gated, number, expert_width, width)
        self.experts_up = weight(own, number, expert_width, width)
        self.experts_down = weight(own, number, width, expert_width)
        # all shared experts as one of width n_s·h_s: the sum of their outputs is one product
        self.shared_gate = weight(inner > 0 and gated, inner, width)
        self.shared_up = weight(inner > 0, inner, width)
        self.shared_down = weight(inner > 0, width, inner)

    @classmethod
    def from_block(
        cls,
        block: Block,
        width: int,
        options: RouterOptions | None = None,
        *,
        output_multiplier: float = 1.0,
        gated: bool = True,
        backend: str = "auto",
        pool: ExpertPool | None = None,
    ) -> MoELayer:
        """The layer of a block in numbers, with the router that it names.

        Args:
            width: D.
            options: what the plan (R) and the run say to the router, the number of the layer and of its pool included.
            output_multiplier: A of the plan. gated, backend: as above. pool: where the block's experts lie in pools, this layer's.

        Raises:
            ValueError: an unknown router, with the nearest name; what the router or the layer refuses; a pool that is missing.
        """
        if block.pools and pool is None:
            raise ValueError(
                f"the experts of {block.notation} lie in pools that layers share: give this layer's as pool=ExpertPool(...)"
            )
        return cls(
            width,
            build(block, width, options or RouterOptions()) if block.experts else None,
            block.expert or 0,
            block.shared_experts,
            block.shared,
            output_multiplier=output_multiplier,
            gated=gated,
            backend=backend,
            pool=pool,
        )

    @property
    def notation(self) -> str:
        """`16e4a2g1s`: experts, active, groups and shared experts where there are any."""
        own = self.router
        routed = "0e" if own is None else f"{own.experts}e{own.active}a" + (f"{own.groups}g" if own.groups > 1 else "")
        return routed + (f"{self.shared_experts}s" if self.shared_experts else "")

    def extra_repr(self) -> str:
        """The notation, the widths and the multipliers."""
        shared = f", shared_width={self.shared_width}" if self.shared_experts else ""
        return (
            f"{self.notation}, width={self.width}, expert_width={self.expert_width}{shared}, "
            f"output_multiplier={self.output_multiplier:g}, gated={self.gated}"
        )

    def forward(self, x: Tensor, scale: float = 1.0, given: RouterInput | None = None) -> tuple[Tensor, Routing]:
        """Routes and computes.

        Args:
            x: (..., width).
            scale: of the result, beside A.
            given: what the router may read beside x.

        Returns:
            y: (..., width), scale * A * (routed + shared); the routing of all tokens, flattened (no pairs without a router).
        """
        x_TD = x.reshape(-1, self.width)
        routing = self.route(x_TD, given, x.shape[-2] if x.dim() > 2 else None)
        y_TD = experts(x_TD, routing, self.weights, self.backend, self.output_multiplier * scale)
        return y_TD.view(x.shape), routing

    def route(self, x_TD: Tensor, given: RouterInput | None = None, sequence: int | None = None) -> Routing:
        """Which experts each token goes to.

        Args:
            x_TD: (T, width).
            given: what the router may read beside x. sequence: tokens of one sequence.
        """
        if self.router is None:
            return Routing.empty(x_TD.shape[0], device=x_TD.device)
        return self.router(x_TD, None if given is None else given.flat(), sequence)

    @property
    def weights(self) -> ExpertWeights:
        """The matrices, as the expert compute takes them."""
        own = self.experts_gate, self.experts_up, self.experts_down
        return ExpertWeights(
            *(own if self.pool is None else self.pool.matrices), self.shared_gate, self.shared_up, self.shared_down
        )

    def end_step_(self, bias_speed: float) -> None:
        """After every optimizer step: what the router changes by itself (a balance bias, by `bias_speed`)."""
        if self.router is not None:
            self.router.end_step_(bias_speed)


def self_changing(model: nn.Module) -> list[MoELayer | Common]:
    """What of a model changes itself after an optimizer step (each by its ``end_step_``), in that order: its blocks with experts, then
    what their routers share, which may look at all of them."""
    found = [module for module in model.modules() if isinstance(module, (MoELayer, Common))]
    return sorted(found, key=lambda module: isinstance(module, Common))  # stable: layers stay in their order


def _check_pool(pool: ExpertPool, experts: int, width: int, expert_width: int, gated: bool) -> None:
    """The router must choose from the experts that there are, and these fit the layer."""
    found = pool.experts, pool.width, pool.expert_width, pool.gate is not None
    if found != (experts, width, expert_width, gated):
        raise ValueError(
            f"the layer reads experts={experts}, width={width}, expert_width={expert_width}, gated={gated}, and the pool has"
            f" experts={found[0]}, width={found[1]}, expert_width={found[2]}, gated={found[3]}: build them from one block"
        )
