"""The MoE block: y = A * (routed + shared), built from explicit numbers.

Shape suffixes: T tokens, N experts, D width, H expert width, S width of all shared experts together.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts
from mue.moe.routers.top_k import Gates, Router, Score
from mue.moe.routing import Routing

Balance = Literal["bias", "loss", "none"]


class MoELayer(nn.Module):
    """Router, routed experts and shared experts (Complete-muE block, transfer-rules.md 1.1).

    Parameters: `router.weight` (N, D); `experts_gate`, `experts_up` (N, H, D) and `experts_down` (N, D, H);
    `shared_gate`, `shared_up` (S, D) and `shared_down` (D, S), S = shared_experts * shared_width. What a layer does not
    have (no routed experts, no shared ones, no gate) is not there as a parameter.

    Args:
        width: D.
        experts: N; 0 for shared experts only.
        active: a, routed experts per token.
        groups: g, see `Router`.
        shared_experts: n_s, always on.
        expert_width: h.
        shared_width: h_s, of *one* shared expert; `expert_width` where not given.
        score, normalize, gates: see `Router`.
        route_scale: R; the rule wants `active`.
        output_multiplier: A, on routed and shared alike.
        gated: SwiGLU; else gelu(up x).
        balance: "bias" moves the selection bias (`update_bias_`), "loss" puts `load_balance` into
            `Routing.losses`, "none" does neither.
        z_loss: put `router_z` into `Routing.losses`.
        backend: see `mue.moe.experts`.

    Raises:
        ValueError: nothing to compute, widths below 1, A not finite, and what `Router` refuses.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        groups: int = 1,
        shared_experts: int = 0,
        *,
        expert_width: int,
        shared_width: int | None = None,
        score: Score = "sigmoid",
        normalize: bool = True,
        gates: Gates = "normalised",
        route_scale: float = 1.0,
        output_multiplier: float = 1.0,
        gated: bool = True,
        balance: Balance = "bias",
        z_loss: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        shared_width = expert_width if shared_width is None else shared_width
        if experts < 0 or shared_experts < 0 or experts + shared_experts == 0:
            raise ValueError(f"experts={experts}, shared_experts={shared_experts}: at least one expert is needed")
        if min(width, expert_width, shared_width) < 1:
            raise ValueError(f"width={width}, expert_width={expert_width}, shared_width={shared_width} must be >= 1")
        if not math.isfinite(output_multiplier):
            raise ValueError(f"output_multiplier={output_multiplier} must be finite")
        if balance not in ("bias", "loss", "none"):
            raise ValueError(f'balance={balance!r} is unknown: use "bias", "loss" or "none"')
        self.width, self.experts, self.active, self.groups = width, experts, active, groups
        self.shared_experts, self.expert_width, self.shared_width = shared_experts, expert_width, shared_width
        self.output_multiplier, self.gated = float(output_multiplier), gated
        self.balance, self.backend = balance, backend
        self.router: Router | None = None
        if experts:
            self.router = Router(
                width, experts, active, groups, score=score, normalize=normalize, gates=gates,
                route_scale=route_scale, balance_loss=balance == "loss", z_loss=z_loss,
            )  # fmt: skip
        routed, inner = experts > 0, shared_experts * shared_width
        self.experts_gate = _weight(routed and gated, experts, expert_width, width)
        self.experts_up = _weight(routed, experts, expert_width, width)
        self.experts_down = _weight(routed, experts, width, expert_width)
        self.shared_gate = _weight(inner > 0 and gated, inner, width)
        self.shared_up = _weight(inner > 0, inner, width)
        self.shared_down = _weight(inner > 0, width, inner)

    @property
    def notation(self) -> str:
        """`16e4a2g1s`: experts, active, groups and shared experts where there are any."""
        routed = f"{self.experts}e{self.active}a" if self.experts else "0e"
        groups = f"{self.groups}g" if self.experts and self.groups > 1 else ""
        return routed + groups + (f"{self.shared_experts}s" if self.shared_experts else "")

    def extra_repr(self) -> str:
        """The notation, the widths and the multipliers."""
        shared = f", shared_width={self.shared_width}" if self.shared_experts else ""
        return (
            f"{self.notation}, width={self.width}, expert_width={self.expert_width}{shared}, "
            f"output_multiplier={self.output_multiplier:g}, gated={self.gated}, balance={self.balance}"
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Routing]:
        """Routes and computes.

        Args:
            x: (..., width).
            scale: of the result, beside A.

        Returns:
            y: (..., width), scale * A * (routed + shared); the routing of all tokens, flattened (no pairs if experts=0).
        """
        x_TD = x.reshape(-1, self.width)
        routing = self.router(x_TD) if self.router is not None else Routing.empty(x_TD.shape[0], device=x.device)
        weights = ExpertWeights(
            self.experts_gate, self.experts_up, self.experts_down, self.shared_gate, self.shared_up, self.shared_down
        )
        y_TD = experts(x_TD, routing, weights, self.backend, self.output_multiplier * scale)
        return y_TD.view(x.shape), routing

    @torch.no_grad()
    def update_bias_(self, speed: float) -> None:
        """One step of aux-loss-free balancing if `balance` is "bias", else nothing. Once per optimizer step."""
        if self.router is not None and self.balance == "bias":
            self.router.update_bias_(speed)


def _weight(present: bool, *shape: int) -> nn.Parameter | None:
    """A plain start; the plan draws the real one."""
    return nn.Parameter(torch.empty(shape).normal_(std=0.02)) if present else None
