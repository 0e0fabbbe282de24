"""x + c · f(norm x) for each sublayer of a block: by one call of the native kernel where that is faster, else as it reads.

With a modulation (B, 3 D) it is x + c · gate · f(m(norm x)), m(n) = n · (1 + scale) + shift: adaLN (2212.09748), whose shift, scale
and gate each sequence has for itself, in this order.

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
from mue.moe import MoELayer, Routing
from mue.moe.routers.base import RouterInput

_OWN = frozenset({RMSNorm, Linear, Attention, FeedForward, MoELayer})


def add_attention(
    x_BTD: Tensor,
    norm: RMSNorm,
    attention: Attention,
    residual: float,
    past: PastTokens | None = None,
    modulation: Tensor | None = None,
) -> Tensor:
    """x + residual · attention(norm x), after the tokens of ``past``; with a ``modulation`` as above."""
    own = attention
    parts = norm, own.q, own.k, own.v, own.q_norm, own.k_norm, own.o
    if (
        past is None
        and own.causal == (own.rope is not None)
        and untouched(own, *parts)
        and ops.attention_by_kernel(x_BTD, weights := [m.weight for m in parts], modulation)
    ):
        rope = None if own.rope is None else own.rope[: x_BTD.shape[-2]]
        numbers = {"scale": own.scale, "residual": residual, "eps": EPS}
        return sublayer.attention(
            x_BTD, weights, rope, **numbers, half=ops.in_bf16(x_BTD), modulation=_of_each(x_BTD, modulation)
        )
    n_BTD = _modulated_norm(norm, x_BTD, modulation)
    return _sum(x_BTD, own(n_BTD) if past is None else own(n_BTD, past), residual, modulation)


def add_feed_forward(
    x_BTD: Tensor, norm: RMSNorm, ffn: FeedForward, residual: float, modulation: Tensor | None = None
) -> Tensor:
    """x + residual · ffn(norm x), with a ``modulation`` as above."""
    weights = norm.weight, None if ffn.gate is None else ffn.gate.weight, ffn.up.weight, ffn.down.weight
    if untouched(norm, ffn) and ops.feed_forward_by_kernel(x_BTD, weights, modulation):
        # the kernel has one multiplier: l^-α · A, which act on the same branch one after the other
        c = residual * ffn.output_multiplier
        half = ops.in_bf16(x_BTD)
        return sublayer.feed_forward(
            x_BTD, weights, residual=c, eps=EPS, half=half, modulation=_of_each(x_BTD, modulation)
        )
    return _sum(x_BTD, ffn(_modulated_norm(norm, x_BTD, modulation)), residual, modulation)


def add_experts(
    x_BTD: Tensor,
    norm: RMSNorm,
    moe: MoELayer,
    residual: float,
    given: RouterInput | None,
    modulation: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """x + residual · moe(norm x), with a ``modulation`` as above, and the routing.

    Without one the layer takes ``residual`` into its own multiplier where nobody watches.
    """
    also = {} if given is None else {"given": given}
    if modulation is None and untouched(moe) and ops.one_multiplier(x_BTD):
        y_BTD, routing = moe(norm(x_BTD), residual, **also)
        return x_BTD + y_BTD, routing
    y_BTD, routing = moe(_modulated_norm(norm, x_BTD, modulation), **also)
    return _sum(x_BTD, y_BTD, residual, modulation), routing


def modulated(n_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """n · (1 + scale) + shift (adaLN, 2212.09748)."""
    return torch.addcmul(shift_B1D, n_BTD, 1 + scale_B1D)


def _modulated_norm(norm: RMSNorm, x_BTD: Tensor, modulation: Tensor | None) -> Tensor:
    n_BTD: Tensor = norm(x_BTD)
    return n_BTD if modulation is None else modulated(n_BTD, *modulation.unsqueeze(-2).chunk(3, -1)[:2])


def _sum(x_BTD: Tensor, y_BTD: Tensor, residual: float, modulation: Tensor | None) -> Tensor:
    """x + residual · y, or x + residual · gate · y."""
    if modulation is None:
        return torch.add(x_BTD, y_BTD, alpha=residual)
    return torch.addcmul(x_BTD, modulation.unsqueeze(-2).chunk(3, -1)[2], y_BTD, value=residual)


def _of_each(x_BTD: Tensor, modulation: Tensor | None) -> Tensor | None:
    """For the kernel, which reads one for each sequence: torch's operators broadcast one for all. In float, though autocast makes bf16."""
    return None if modulation is None else modulation.float().expand(*x_BTD.shape[:-2], 3 * x_BTD.shape[-1])


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
