"""Attention and normalisation by whichever of torch's ways is fastest here; measured in docs/performance.md.

Shape suffixes: B sequences, T tokens, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# In bf16 on a CPU the fused kernel's backward is several times slower than plain products up to this length.
_PLAIN_LENGTH = 256


def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, (B, H, T, E): plain products for short sequences of bf16 on a CPU, else torch's fused."""
    q, k = (x.to(v_BKTE.dtype) for x in (q_BHTE, k_BKTE))  # under autocast a norm may come back in fp32
    H, K = q.shape[1], k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _PLAIN_LENGTH:
        k, v = (x.repeat_interleave(H // K, 1) if H > K else x for x in (k, v_BKTE))
        return _plain(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v_BKTE, is_causal=True, scale=scale, enable_gqa=H > K)


def _plain(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, scale: float) -> Tensor:
    """Scale and mask ride along in the product; the softmax is in fp32."""
    B, H, T, _ = q_BHTE.shape
    mask_TT = torch.full((T, T), float("-inf"), dtype=q_BHTE.dtype, device=q_BHTE.device).triu(1)
    q, k, v = (x.flatten(0, 1) for x in (q_BHTE, k_BHTE, v_BHTE))
    score = torch.baddbmm(mask_TT.expand(B * H, T, T), q, k.mT, alpha=scale)
    y: Tensor = torch.bmm(score.softmax(-1, dtype=torch.float32).to(v.dtype), v).view(B, H, T, -1)
    return y


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) · gain over the last axis.

    Eagerly on a CPU torch builds it from a dozen passes; one function with its own backward makes half of them. Elsewhere,
    and where types are mixed, torch's own.
    """
    if x.device.type == "cpu" and x.dtype == gain.dtype and not torch.compiler.is_compiling():
        y: Tensor = _RMSNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    else:
        y = F.rms_norm(x, gain.shape, gain, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit: Tensor = x * inverse
        ctx.save_for_backward(unit, gain, inverse)
        return unit * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, gain, inverse = ctx.saved_tensors
        product = (dy * unit).flatten(0, -2)
        along = torch.mv(product, gain).div_(unit.shape[-1]).view(inverse.shape)
        dx = (dy * gain).addcmul_(unit, along, value=-1).mul_(inverse)
        return dx, product.sum(0), None
