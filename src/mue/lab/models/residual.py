"""x + c · f(norm x) for each sublayer of a block: by one call of the native kernel where that is faster, else as it reads.

The kernel's call leaves out the modules it stands for, so it is taken only where nobody would notice: in training, on a CPU,
and where every module is as it was made. A hook, a patch, a replaced or wrapped module, an observer of operators (``mue check``)
and a compiled MoE block get what they look at.

Shape suffixes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mue.kernels import sublayer
from mue.lab.models import ops
from mue.lab.models.layers import EPS, Attention, FeedForward, Linear, PastTokens, RMSNorm
from mue.moe import ExpertWeights, MoELayer, Routing, experts
from mue.moe.routers.base import RouterInput

_OWN = frozenset({RMSNorm, Linear, Attention, FeedForward, MoELayer})


def add_attention(
    x_BTD: Tensor, norm: RMSNorm, attention: Attention, residual: float, past: PastTokens | None = None
) -> Tensor:
    """x + residual · attention(norm x), after the tokens of ``past``."""
    own = attention
    if past is not None:
        return torch.add(x_BTD, attention(norm(x_BTD), past), alpha=residual)
    parts = norm, own.q, own.k, own.v, own.q_norm, own.k_norm, own.o
    if (
        own.rope is not None
        and untouched(own, *parts)
        and ops.attention_by_kernel(x_BTD, weights := [m.weight for m in parts])
    ):
        rope, bf16 = own.rope[: x_BTD.shape[-2]], ops.in_bf16(x_BTD)
        return sublayer.attention(x_BTD, weights, rope, scale=own.scale, residual=residual, eps=EPS, half=bf16)
    return torch.add(x_BTD, attention(norm(x_BTD)), alpha=residual)


def add_feed_forward(x_BTD: Tensor, norm: RMSNorm, ffn: FeedForward, residual: float) -> Tensor:
    """x + residual · ffn(norm x)."""
    weights = norm.weight, None if ffn.gate is None else ffn.gate.weight, ffn.up.weight, ffn.down.weight
    if untouched(norm, ffn) and ops.feed_forward_by_kernel(x_BTD, weights):
        # the kernel has one multiplier: l^-α · A, which act on the same branch one after the other
        c = residual * ffn.output_multiplier
        return sublayer.feed_forward(x_BTD, weights, residual=c, eps=EPS, half=ops.in_bf16(x_BTD))
    return torch.add(x_BTD, ffn(norm(x_BTD)), alpha=residual)


def of_feed_forward(n_BTD: Tensor, ffn: FeedForward) -> Tensor:
    """ffn(n) of what was normed and modulated already: as the shared experts of a block without others, in one call of their kernel."""
    weights = None if ffn.gate is None else ffn.gate.weight, ffn.up.weight, ffn.down.weight
    if untouched(ffn) and ops.experts_by_kernel(n_BTD, own := ExpertWeights(None, None, None, *weights)):
        n_TD = n_BTD.reshape(-1, n_BTD.shape[-1])
        nobody = Routing.empty(len(n_TD), device=n_TD.device)
        return experts(n_TD, nobody, own, scale=ffn.output_multiplier).view(n_BTD.shape)
    return ffn(n_BTD)  # type: ignore[no-any-return]


def add_experts(
    x_BTD: Tensor, norm: RMSNorm, moe: MoELayer, residual: float, given: RouterInput | None
) -> tuple[Tensor, Routing]:
    """x + residual · moe(norm x), and the routing. The layer takes ``residual`` into its own multiplier where nobody watches."""
    also = {} if given is None else {"given": given}
    if untouched(moe) and ops.one_multiplier(x_BTD):
        y_BTD, routing = moe(norm(x_BTD), residual, **also)
        return x_BTD + y_BTD, routing
    y_BTD, routing = moe(norm(x_BTD), **also)
    return torch.add(x_BTD, y_BTD, alpha=residual), routing


def untouched(*modules: nn.Module) -> bool:
    """Whether modules are as they were made: none replaced or patched, none with a hook that wants to be called."""
    for module in modules:
        if (
            # the very types: a subclass may compute something else
            type(module) not in _OWN
            or "forward" in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
        ):
            return False
        if module._backward_hooks or module._backward_pre_hooks:
            return False
    return True
