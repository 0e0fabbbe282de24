"""Faults of wiring, each as a change of a right case: what it is, where it is possible, and the name a check must give.

``FAULTS`` maps a fault's name to (families, apply, culprit): ``culprit`` is a pattern that must be found in the place a
failing finding names.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mue
from mue.lab.model import LanguageModel
from mue.moe.routing import Routing
from wiring_cases import BASE, OURS, STOCK, TRAININGS, TUNED, Case, case

H, T = OURS
M, Q, S = STOCK
ALL, MOE, HF, MINE = (H, T, M, Q, S), (H, M, Q, S), (M, Q, S), (H, T)
FFN = r"(ffn|mlp|moe|shared|experts)\S*down"


@dataclass(frozen=True)
class Fault:
    families: tuple[str, ...]
    apply: Callable[[Case], None]
    culprit: str


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, families: tuple[str, ...], culprit: str
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def keep(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        assert name not in FAULTS
        FAULTS[name] = Fault(families, apply, culprit)
        return apply

    return keep


def broken(name: str, family: str) -> Case:
    """A case of ``family`` with one fault in it."""
    made = case(family)
    FAULTS[name].apply(made)
    return made


# ---- tools ---------------------------------------------------------------------------------------------------------------


def around(module: nn.Module, change: Callable[..., Any]) -> None:
    """Replace a module's forward by ``change(old forward, *args, **kwargs)``."""
    old = module.forward
    module.forward = lambda *args, **kwargs: change(old, *args, **kwargs)  # type: ignore[method-assign]


def times(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns (the first of several results)."""

    def change(old: Any, *args: Any, **kwargs: Any) -> Any:
        out = old(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    around(module, change)


def branches(c: Case) -> list[nn.Module]:
    """The feed-forward of every block, dense or with experts."""
    if c.ours:
        return [b.ffn if b.ffn is not None else b.moe for b in c.model.blocks]  # type: ignore[union-attr]
    return [layer.mlp for layer in c.model.model.layers]  # type: ignore[union-attr]


def attentions(c: Case) -> list[nn.Module]:
    if c.ours:
        return [b.attention for b in c.model.blocks]  # type: ignore[union-attr]
    return [layer.self_attn for layer in c.model.model.layers]  # type: ignore[union-attr]


def last_moe(c: Case) -> nn.Module:
    return branches(c)[-1]


def routers(c: Case) -> list[nn.Module]:
    return [c.module(p) for p in c.of("router")]


@torch.no_grad()
def scale(tensors: list[Any], factor: float) -> None:
    for p in tensors:
        p.parameter.mul_(factor)


def regroup(c: Case, groups: list[dict[str, Any]], **more: Any) -> None:
    """A new optimizer (and warmup) of other groups."""
    c.optimizer = torch.optim.AdamW(groups, **more)
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambda step: min(1.0, (step + 1) / 10))


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


# ---- init ------------------------------------------------------------------------------------------------------------------


@fault("wrong fan-in axis for fused experts", MOE, r"experts\S*down")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_down"):
        p.parameter.mul_((p.fan_in / p.experts / p.fan_out) ** 0.5)


@fault("one expert of N left at default init", MOE, r"experts\S*down\S*\[expert 5\]")
@torch.no_grad()
def _(c: Case) -> None:
    p = c.of("expert_down")[-1]
    p.parameter[5].normal_(std=0.02)


@fault("experts missed by a name pattern", MOE, r"experts\S*(up|gate_up)")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.normal_(std=0.02)


@fault("gate half of the feed-forward at default init", ALL, r"gate")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("ffn_gate", "expert_gate"):
        half = (
            p.parameter
            if not p.layout.parts
            else p.parameter.chunk(2, p.layout.axes.index("out"))[p.layout.parts.index("expert_gate")]
        )
        half.normal_(std=0.02)


@fault("router at default init", MOE, r"router|gate\.weight")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("router"):
        nn.init.kaiming_uniform_(p.parameter, a=5**0.5)


@fault("depth-scaled init on top", ALL, r"(o|o_proj)\.weight")
def _(c: Case) -> None:
    scale(c.of("attention_o"), 0.5)


@fault("all experts from one draw", MOE, r"\[expert 1\]")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.copy_(p.parameter[:1].clone().expand_as(p.parameter))


@fault("every layer from one seed", ALL, r"\.1\.")
@torch.no_grad()
def _(c: Case) -> None:
    many = c.of("attention_o")
    many[1].parameter.copy_(many[0].parameter)


@fault("gains at zero", ALL, r"norm")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("norm"):
        p.parameter.zero_()


@fault("head drawn again after plan.init_", (H, M, Q, S), r"head")
def _(c: Case) -> None:
    (c.model.head if c.ours else c.model.lm_head).reset_parameters()  # type: ignore[operator, union-attr]


@fault("embedding drawn with a width factor", ALL, r"embed")
def _(c: Case) -> None:
    scale(c.of("embedding"), 2**-0.5)


@fault("down projections drawn without the expansion's root", ALL, r"down")
def _(c: Case) -> None:
    scale(c.of("ffn_down", "expert_down", "shared_down"), 0.73)


@fault("unfolded init on a folded plan", HF, r"o_proj|down")
def _(c: Case) -> None:
    c.plan.inputs.plan()
    scale(c.of("attention_o"), 2.0)


# ---- groups ----------------------------------------------------------------------------------------------------------------


@fault("router at base lr", MOE, r"(router|gate)\S*: lr")
def _(c: Case) -> None:
    for g in c.apart("router"):
        g["lr"] = g["initial_lr"] = TUNED.lr


@fault("head lr scaled like a hidden matrix", (H, M, Q, S), r"head\S*: lr")
def _(c: Case) -> None:
    for g in c.apart("head"):
        g["lr"], g["initial_lr"] = g["lr"] / 2, g["initial_lr"] / 2


@fault("down lr of the unfolded plan", HF, r"down\S*.*: lr")
def _(c: Case) -> None:
    for g in c.apart("expert_down"):
        g["lr"], g["initial_lr"] = g["lr"] * 2, g["initial_lr"] * 2


@fault("weight decay on norms", ALL, r"norm.*: weight_decay")
def _(c: Case) -> None:
    for g in c.apart("norm", "qk_norm", "final_norm"):
        g["weight_decay"] = 0.1


@fault("no weight decay on stacked experts", MOE, r"experts.*: weight_decay")
def _(c: Case) -> None:
    for g in c.apart("expert_up", "expert_gate", "expert_down"):
        g["weight_decay"] = 0.0


@fault("one weight decay for all widths", ALL, r": weight_decay")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        if g["weight_decay"]:
            g["weight_decay"] = TUNED.weight_decay


@fault("eps unscaled", ALL, r": eps")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["eps"] = 1e-8


@fault("betas not rescaled for the duration", ALL, r": betas")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["betas"] = TUNED.betas


@fault("Adam for AdamW", ALL, r"torch\.optim\.Adam")
def _(c: Case) -> None:
    groups = [{k: v for k, v in g.items() if k != "decoupled_weight_decay"} for g in c.optimizer.param_groups]
    c.optimizer = torch.optim.Adam(groups)
    c.scheduler = None


@fault("stacked experts filtered out of the optimizer", MOE, r"experts")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["params"] = [p for p in g["params"] if p.dim() < 3]


@fault("one parameter in two groups", ALL, r"(o|o_proj)\.weight")
def _(c: Case) -> None:
    p = c.of("attention_o")[0]
    c.optimizer.param_groups.append({**c.group(p), "params": [p.parameter]})


@fault("optimizer of an older copy of the model", ALL, r"embed|blocks|layers")
def _(c: Case) -> None:
    c.model = copy.deepcopy(c.model)
    if c.clip is not None:
        c.clip = None


@fault("optimizer of a stale plan", ALL, r": (lr|weight_decay|eps)")
def _(c: Case) -> None:
    groups = c.plan.retuned(lr=TUNED.lr * 2).param_groups(c.model)
    regroup(c, groups)


@fault("default groups: one lr for everything", ALL, r": lr")
def _(c: Case) -> None:
    regroup(c, [{"params": list(c.model.parameters())}], lr=TUNED.lr, weight_decay=TUNED.weight_decay)


# ---- scheduler ---------------------------------------------------------------------------------------------------------------


@fault("scheduler that writes absolute lr", ALL, r"step")
def _(c: Case) -> None:
    def write(step: int) -> None:
        for g in c.optimizer.param_groups:
            g["lr"] = TUNED.lr * min(1.0, (step + 1) / 10)

    c.scheduler = write


@fault("OneCycleLR with one peak", ALL, r"OneCycleLR")
def _(c: Case) -> None:
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(
        c.optimizer, max_lr=TUNED.lr, total_steps=50, cycle_momentum=False
    )


@fault("scheduler that cycles momentum", ALL, r"OneCycleLR")
def _(c: Case) -> None:
    peaks = [g["initial_lr"] for g in c.optimizer.param_groups]
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(c.optimizer, max_lr=peaks, total_steps=50)


@fault("cosine floor as an absolute lr", ALL, r"CosineAnnealingLR")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["lr"] = g["initial_lr"]
    c.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(c.optimizer, T_max=50, eta_min=1e-4)


@fault("warmup on some groups only", ALL, r"LambdaLR")
def _(c: Case) -> None:
    lambdas = [
        (lambda step: 1.0) if i else (lambda step: min(1.0, (step + 1) / 10))
        for i in range(len(c.optimizer.param_groups))
    ]
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambdas)


# ---- training ----------------------------------------------------------------------------------------------------------------


@fault("frozen experts", MOE, r"experts")
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.requires_grad_(False)


@fault("experts computed from detached weights", MOE, r"experts")
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.register_hook(torch.zeros_like)


@fault("one expert of N never trained", MOE, r"experts\S*\[expert 0\]")
def _(c: Case) -> None:
    def hook(g: Tensor) -> Tensor:
        g = g.clone()
        g[0] = 0
        return g

    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.register_hook(hook)


@fault("router under no_grad", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    for r in routers(c):

        def forward(old: Any, x: Tensor) -> Any:
            with torch.no_grad():
                return old(x)

        around(r, forward)


@fault("bf16 parameters that never move", ALL, r"norm")
def _(c: Case) -> None:
    c.plan = c.plan.retuned(lr=TUNED.lr / 16)
    c.low()
    c.checkpoint = None
    regroup(c, c.plan.param_groups(c.model))


@fault("queries detached", ALL, r"(q|q_norm|q_proj|q_b_proj|q_a_proj)\.weight|q_a_layernorm")
def _(c: Case) -> None:
    for p in c.of("attention_q"):
        around(c.module(p), lambda old, *a: old(*a).detach())


@fault("router reads the stream before its norm", (H,), r"moe|router")
def _(c: Case) -> None:
    for b in c.model.blocks:  # type: ignore[union-attr]
        seen: list[Tensor] = []
        around(b.ffn_norm, lambda old, x, seen=seen: (seen.clear(), seen.append(x), old(x))[2])
        around(b.moe.router, lambda old, x, seen=seen: old(seen[0].reshape(x.shape)))  # type: ignore[union-attr]


@fault("loss summed over tokens instead of averaged", MINE, r"loss|clip")
def _(c: Case) -> None:
    def change(old: Any, *args: Any) -> Any:
        out = old(*args)
        if out.loss is not None:
            out.loss = out.loss * args[0].numel()
        return out

    around(c.model, change)


@fault("parameter stepped twice", ALL, r"embed|head|blocks|layers")
def _(c: Case) -> None:
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        old()
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


@fault("weight decay applied by hand as well", ALL, r"embed|head|blocks|layers")
def _(c: Case) -> None:
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in c.model.parameters():
                p.mul_(1 - 1e-2)
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


# ---- plan, tied, clipping, checkpoint --------------------------------------------------------------------------------------


@fault("tied head untied by a copy", (T,), r"head|tied")
def _(c: Case) -> None:
    c.model.head.weight = nn.Parameter(c.model.embedding.weight.detach().clone())  # type: ignore[union-attr]


@fault("head tied where the plan has it apart", (H, M, Q, S), r"head|tied|model is not")
def _(c: Case) -> None:
    if c.ours:
        c.model.head.weight = c.model.embedding.weight  # type: ignore[union-attr]
    else:
        c.model.lm_head.weight = c.model.model.embed_tokens.weight  # type: ignore[union-attr]


@fault("head starts as a copy of the embedding", (H, M, Q, S), r"head")
@torch.no_grad()
def _(c: Case) -> None:
    head, embedding = c.of("head")[0], c.of("embedding")[0]
    head.parameter.copy_(embedding.parameter)


@fault("stale plan: another granularity", ALL, r"down|up|gate|experts")
def _(c: Case) -> None:
    _replan(c, granular=True)


@fault("stale plan: another number of layers", ALL, r"layers|blocks")
def _(c: Case) -> None:
    _replan(c, granular=False)


def _replan(c: Case, granular: bool) -> None:
    """The plan of another target than the model; the optimizer stays."""
    target: Any = c.plan.target
    changed = []
    for b in target.blocks:
        if granular:
            changed.append(replace(b, ffn=b.ffn * 2) if b.ffn else replace(b, expert=b.expert * 2))
        else:
            changed.append(b)
    inputs = c.plan.inputs
    kinds = changed if granular else changed[:1]
    other = (
        mue.Mixed(
            width=target.width,
            blocks=tuple(kinds) if granular else (replace(kinds[0], layers=1),),
            head_dim=target.head_dim,
            heads=target.heads,
            kv_heads=target.kv_heads,
            sequence=target.sequence,
            vocab=target.vocab,
            tied=target.tied,
        )
        if hasattr(mue, "Mixed")
        else target
    )
    plan = mue.transfer(inputs.base, other, inputs.tuned, base_training=inputs.base_training, training=inputs.training)
    if c.plan.folding is not None:
        from mue.fold import fold

        plan = fold(plan, c.plan.folding.route)
    c.plan = plan
    c.checkpoint = {"plan": plan.hash}
    c.clip = None


@fault("stale plan: multipliers of another one", MINE, r"multiplier")
def _(c: Case) -> None:
    other = mue.transfer(BASE, mue.Dense(width=64, ffn=128, layers=2, head_dim=16), TUNED, **TRAININGS)  # type: ignore[arg-type]
    plan, target = c.plan, OURS[c.family]
    model = LanguageModel(target, replace(other.multipliers, residual=1.0))
    model.load_state_dict(c.model.state_dict())
    c.model = model
    c.plan = plan
    c.optimizer = torch.optim.AdamW(
        [{**g, "params": []} for g in c.optimizer.param_groups if False] or list(model.parameters())
    )
    c.scheduler = None


@fault("a parameter nobody planned", MINE, r"extra")
def _(c: Case) -> None:
    c.model.extra = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]


@fault("checkpoint of another plan", ALL, r"checkpoint")
def _(c: Case) -> None:
    c.checkpoint = {"plan": c.plan.scaled(2.0).hash}


@fault("checkpoint without a plan", ALL, r"checkpoint")
def _(c: Case) -> None:
    c.checkpoint = {"step": 3}


@fault("folded gradients clipped by their plain norm", HF, r"clip")
def _(c: Case) -> None:
    c.clip = lambda: nn.utils.clip_grad_norm_(c.model.parameters(), 1.0)


@fault("clipped per tensor", HF, r"weight|proj")
def _(c: Case) -> None:
    def clip() -> None:
        for p in c.model.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_([p], 1.0)

    c.clip = clip


@fault("another clip threshold than the plan's", HF, r"clip")
def _(c: Case) -> None:
    from mue.fold import clip_grad_norm_, coefficients

    c.clip = lambda: clip_grad_norm_(c.model.parameters(), 0.25, coefficients=coefficients(c.plan, c.model))
