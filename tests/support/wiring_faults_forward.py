"""Faults of the forward pass: multipliers and gates."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.moe.routing import Routing
from support.wiring_cases import Case
from support.wiring_faults import (
    ALL,
    FFN,
    HF,
    MINE,
    MOE,
    H,
    M,
    Q,
    S,
    T,
    around,
    attentions,
    branches,
    fault,
    last_moe,
    regroup,
    routers,
    scale,
    times,
)

# ---- forward multipliers --------------------------------------------------------------------------------------------------


@fault("output multiplier missing", MINE, FFN)
def _(c: Case) -> None:
    for b in branches(c):
        b.output_multiplier = 1.0


@fault("output multiplier doubled", MINE, FFN)
def _(c: Case) -> None:
    for b in branches(c):
        b.output_multiplier **= 2


@fault("output multiplier missing in one layer", MINE, r"blocks\.1\S*down")
def _(c: Case) -> None:
    branches(c)[1].output_multiplier = 1.0


@fault("a folded output multiplier applied in the forward pass too", HF, FFN)
def _(c: Case) -> None:
    for b in branches(c):
        times(b, 0.5)


@fault("output multiplier on the routed sum only", (H,), r"shared_down")
def _(c: Case) -> None:
    for b in branches(c):
        b.shared_down = nn.Parameter(b.shared_down / b.output_multiplier)
        around(b, _unscale_shared)
    regroup(c, c.plan.param_groups(c.model))
    with torch.no_grad():
        for b in branches(c):
            b.shared_down.mul_(b.output_multiplier)


def _unscale_shared(old: Any, x: Tensor) -> Any:
    y, routing = old(x)
    b = old.__self__
    shared = (F.silu(x @ b.shared_gate.T) * (x @ b.shared_up.T)) @ b.shared_down.T
    return y + shared * (1 - b.output_multiplier), routing


@fault("route scale missing", (H, S), r"experts\S*down|gate\.weight|router")
def _(c: Case) -> None:
    for r in routers(c):
        if c.ours:
            r.route_scale = 1.0
        else:
            r.routed_scaling_factor = 1.0


@fault("route scale doubled", (H, S), r"experts\S*down|gate\.weight|router")
def _(c: Case) -> None:
    for r in routers(c):
        if c.ours:
            r.route_scale **= 2
        else:
            r.routed_scaling_factor **= 2


@fault("route scale in the weights and in the model", (M, Q), r"experts\S*down")
def _(c: Case) -> None:
    for b in branches(c):
        times(b.experts, float(c.plan.target.blocks[0].active))  # type: ignore[arg-type]


@fault("shared expert scaled by R", (H, S), r"shared\S*down")
def _(c: Case) -> None:
    if not c.ours:
        times(last_moe(c).shared_experts, 2.0)  # type: ignore[arg-type]
        return
    for b in branches(c):
        around(b, _scale_shared)


def _scale_shared(old: Any, x: Tensor) -> Any:
    y, routing = old(x)
    b = old.__self__
    shared = (F.silu(x @ b.shared_gate.T) * (x @ b.shared_up.T)) @ b.shared_down.T
    return y + shared * b.output_multiplier * (b.router.route_scale - 1), routing


@fault("residual multiplier missing", MINE, r"attention\.o|attention branch")
def _(c: Case) -> None:
    for b in c.model.blocks:  # type: ignore[union-attr]
        b.residual = 1.0


@fault("residual multiplier doubled", MINE, r"attention\.o|attention branch")
def _(c: Case) -> None:
    for b in c.model.blocks:  # type: ignore[union-attr]
        b.residual **= 2


@fault("residual multiplier missing on the feed-forward only", MINE, FFN)
def _(c: Case) -> None:
    for b in branches(c):
        times(b, 1 / c.plan.residual_multiplier)


@fault("residual multiplier on the stream instead of the branch", MINE, r"attention\.o|residual stream")
def _(c: Case) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = x * self.residual + self.attention(self.attention_norm(x))
        y, routing = self.ffn_norm(x), None
        if self.ffn is not None:
            y = self.ffn(y)
        else:
            y, routing = self.moe(y)
        return x * self.residual + y, routing

    for b in c.model.blocks:  # type: ignore[union-attr]
        b.forward = types.MethodType(forward, b)


@fault("a folded residual multiplier applied in the forward pass too", HF, r"o_proj")
def _(c: Case) -> None:
    for a in attentions(c):
        times(a, 0.5)


@fault("head multiplier dropped", MINE, r"head|embedding")
def _(c: Case) -> None:
    around(c.model.final_norm, lambda old, x: old(x) / c.plan.head_multiplier)  # type: ignore[arg-type]


@fault("head multiplier doubled", ALL, r"head|embed")
def _(c: Case) -> None:
    if c.ours:
        times(c.model.final_norm, c.plan.head_multiplier)  # type: ignore[arg-type]
    else:
        times(c.model.lm_head, 0.5)  # type: ignore[arg-type]


@fault("head multiplier only where no targets are given", MINE, r"head|embedding")
def _(c: Case) -> None:
    def change(old: Any, tokens: Tensor, targets: Tensor | None = None) -> Any:
        out = old(tokens, targets)
        if targets is not None:
            out.logits = out.logits / c.plan.head_multiplier
        return out

    around(c.model, change)


@fault("tied embedding scaled twice", (T,), r"embedding")
def _(c: Case) -> None:
    times(c.model.embedding, c.plan.head_multiplier)  # type: ignore[arg-type]


@fault("embedding multiplied by its width's root", ALL, r"embed")
def _(c: Case) -> None:
    times(c.model.embedding if c.ours else c.model.model.embed_tokens, 7.0)  # type: ignore[arg-type, union-attr]


@fault("attention scale left at 1/sqrt(head_dim)", MINE, r"attention\.q")
def _(c: Case) -> None:
    for a in attentions(c):
        a.scale = a.head_dim**-0.5


@fault("attention scale 1/head_dim", ALL, r"(q|q_proj|q_norm|q_b_proj|q_a_proj)\.weight")
def _(c: Case) -> None:
    for a in attentions(c):
        if c.ours:
            a.scale = 1 / a.head_dim
        else:
            a.scaling = a.scaling**2


@fault("attention scale applied twice", MINE, r"attention\.q")
def _(c: Case) -> None:
    for a in attentions(c):
        times(a.q_norm, a.scale)  # type: ignore[arg-type]


@fault("swapped gate and up", (*MINE, M, Q), r"gate")
def _(c: Case) -> None:
    for b in branches(c):
        if not c.ours:

            def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                up, gate = (x @ self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
                y = (self.act_fn(gate) * up) @ self.down_proj.transpose(1, 2)
                picked = torch.zeros(x.shape[0], y.shape[0], dtype=y.dtype).scatter(1, index, weights)
                return torch.einsum("ntd,tn->td", y, picked)

            b.experts.forward = types.MethodType(forward, b.experts)  # type: ignore[union-attr]
        elif c.family == H:
            around(b, _swapped)
        else:
            b.forward = types.MethodType(
                lambda self, x: self.down(F.silu(self.up(x)) * self.gate(x)) * self.output_multiplier, b
            )


def _swapped(old: Any, x: Tensor) -> Any:
    b = old.__self__
    names = ("experts_gate", "experts_up"), ("shared_gate", "shared_up")
    for one, other in names:
        b._parameters[one], b._parameters[other] = b._parameters[other], b._parameters[one]
    try:
        return old(x)
    finally:
        for one, other in names:
            b._parameters[one], b._parameters[other] = b._parameters[other], b._parameters[one]


# ---- gates -----------------------------------------------------------------------------------------------------------------


def reweigh(c: Case, change: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Replace the weights: ``change(router, logits (T, N), index (T, K), weights (T, K))``."""
    for r in routers(c):

        def forward(old: Any, x: Tensor, r: nn.Module = r) -> Any:
            out = old(x)
            logits = F.linear(x.reshape(-1, x.shape[-1]), r.weight)  # type: ignore[arg-type]
            if isinstance(out, Routing):
                index = out.expert_P.view(out.num_tokens, -1)
                weights = change(r, logits, index, out.weight_P.view(index.shape))
                return Routing.from_topk(index, weights, out.num_experts, route_scale=out.route_scale)
            return (out[0], change(r, logits, out[2], out[1]), out[2])

        around(r, forward)


@fault("softmax without renormalisation", MOE, r"router|gate\.weight|experts\S*down")
def _(c: Case) -> None:
    reweigh(c, lambda r, logits, index, w: logits.softmax(1).gather(1, index) * w.sum(1, keepdim=True))


@fault("sigmoid without renormalisation", MOE, r"router|gate\.weight|experts\S*down")
def _(c: Case) -> None:
    reweigh(c, lambda r, logits, index, w: logits.sigmoid().gather(1, index) * w.sum(1, keepdim=True))


@fault("scores of the other kind", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    def change(r: nn.Module, logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        picked = logits.gather(1, index)
        softmax = c.plan.target.blocks[-1].router == "softmax"
        other = picked.sigmoid() if softmax else (picked - picked.amax(1, keepdim=True)).exp()
        return other / other.sum(1, keepdim=True) * w.sum(1, keepdim=True)

    reweigh(c, change)


@fault("renormalised per group instead of globally", (H,), r"router|experts_down")
def _(c: Case) -> None:
    def change(r: Any, logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        grouped = w.view(w.shape[0], r.groups, -1)
        return (grouped / grouped.sum(2, keepdim=True)).reshape(w.shape) * r.route_scale

    reweigh(c, change)


@fault("gates applied twice", MOE, r"router|gate\.weight|experts\S*down")
def _(c: Case) -> None:
    reweigh(c, lambda r, logits, index, w: w * w / w.sum(1, keepdim=True))


@fault("gates not applied: every active expert counts 1/a", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    reweigh(c, lambda r, logits, index, w: torch.ones_like(w) * w.sum(1, keepdim=True) / w.shape[1] + 0 * w)


@fault("balance bias in the weights", (H, S), r"router|gate\.weight")
def _(c: Case) -> None:
    def change(r: nn.Module, logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        bias = torch.linspace(-0.3, 0.3, logits.shape[1])
        picked = (logits.sigmoid() + bias).gather(1, index)
        return picked / picked.sum(1, keepdim=True) * w.sum(1, keepdim=True)

    reweigh(c, change)


@fault("one expert fewer per token", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    def change(r: nn.Module, logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        kept = torch.cat([w[:, :-1], torch.zeros_like(w[:, -1:])], 1)
        return kept / kept.sum(1, keepdim=True) * w.sum(1, keepdim=True)

    reweigh(c, change)


@fault("experts in another order than the router's rows", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    for r in routers(c):

        def forward(old: Any, x: Tensor) -> Any:
            out = old(x)
            if isinstance(out, Routing):
                index = (out.expert_P + 1) % out.num_experts
                return Routing.from_topk(
                    index.view(out.num_tokens, -1), out.weight_P.view(out.num_tokens, -1), out.num_experts
                )
            return (out[0], out[1], (out[2] + 1) % out[0].shape[-1])

        around(r, forward)


@fault("router far too large at the start", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    scale(c.of("router"), 60.0)
