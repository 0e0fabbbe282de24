"""Every operator of the lab's models by whichever way is fastest where it runs; measured in docs/performance.md.

This is the one place that knows of the native kernel, of torch.compile, of processors without bf16 instructions, and that
weights with a leading axis are stacked variants'. Cross-entropy has one way, torch's own: nothing tried was faster in both
precisions.

Shape suffixes: B sequences, T tokens, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from mue.kernels import library, norm
from mue.kernels.library import bf16_instructions
from mue.kernels.operator import thread_count
from mue.moe.experts import compute_dtype

# With bf16 instructions the fused kernel's backward is several times slower than plain products up to this length
# (measured on a machine with AMX before this was written; none was at hand to repeat it).
_PLAIN_LENGTH = 256
# Elements of a matrix of the float32 FFN, of one of attention (in bf16 twice as many), and of a sequence, up to which the
# kernel's sublayers are faster than torch's operators. Beyond, a matrix leaves the cache: at d512 the kernel's attention took 93 ms to
# torch's 84, its FFN 295 to 196 (docs/performance.md).
_KERNEL_MATRIX, _KERNEL_HEADS, _KERNEL_SEQUENCE = 1 << 18, 1 << 17, 1 << 17


def rms_norm(x: Tensor, gain: Tensor, eps: float, rope: Tensor | None = None) -> Tensor:
    """x / rms(x) · gain over the last axis, in float32 or better, and RoPE after it where there is a table for it.

    Args:
        x: (..., E); with ``rope`` (..., B, T, H, E). gain: (E,), or of variants (V, E) for x (V, ...).
        rope: see :func:`rotate`.
    """
    width = gain.shape[-1:]
    if gain.dim() == 1:
        if (fused := norm.rms_norm(x, gain, eps, rope)) is not None:
            return fused
        y = F.rms_norm(x.to(torch.promote_types(x.dtype, gain.dtype)), width, gain, eps)
    else:
        y = (F.rms_norm(x, width, None, eps) * gain.view(-1, *(1,) * (x.dim() - 2), *width)).to(x.dtype)
    return y if rope is None else rotate(y, rope)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE (2104.09864) on neighbouring pairs of the last axis of (..., T, H, E): one complex product; in float32 or better.

    Args:
        rope: (T, 1, E/2, 2), cos and sin of the angles.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, rope.dtype), torch.float32)  # no complex bf16 in torch
    if torch.compiler.is_compiling():  # the same in reals: the compiler makes no kernels for complex numbers
        (a, b), (cos, sin) = x.to(dtype).view(*x.shape[:-1], -1, 2).unbind(-1), rope.to(dtype).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    # one complex product: 0.80 ms where chunks, products and a concatenation took 2.05 (docs/LOG.md)
    pairs = torch.view_as_complex(x.to(dtype).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rope.to(dtype))).flatten(-2).to(x.dtype)


def look_up(token: Tensor, table: Tensor) -> Tensor:
    """Rows of the table (vocabulary, D); of variants (V, vocabulary, D) each from its own for tokens (V, ...)."""
    if table.dim() == 2:
        return F.embedding(token, table)
    variants, vocab, _ = table.shape
    first = torch.arange(0, variants * vocab, vocab, device=token.device)
    return F.embedding(token + first.view(-1, *(1,) * (token.dim() - 1)), table.flatten(0, 1))


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """x · multiplier, free where it is 1."""
    return x if multiplier == 1.0 else x * multiplier


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) · weightᵀ (out, in); of variants x (V, ..., in) and weight (V, out, in), one batched product.

    Where bf16 would be emulated: the product of the same rounded values in float32, rounded, which is what bf16 means.
    """
    if x.device.type == "cpu" and in_bf16(x) and not bf16_instructions():
        emulated: Tensor = _EmulatedProduct.apply(x, weight)  # type: ignore[no-untyped-call]
        return emulated
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight)
    return (x.flatten(1, -2) @ weight.mT).view(*x.shape[:-1], -1)


class _EmulatedProduct(torch.autograd.Function):
    """With a backward of its own, since torch.compile traces what autograd makes of the forward under the caller's autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            half, matrix = x.bfloat16(), weight.bfloat16()
            ctx.save_for_backward(half, matrix)
            ctx.types = x.dtype, weight.dtype
            return _product(half.float(), matrix.float()).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        half, matrix = ctx.saved_tensors
        lead = matrix.dim() - 2
        with torch.autocast("cpu", enabled=False):
            dy_rows, x_rows = dy.float().flatten(lead, -2), half.float().flatten(lead, -2)
            dx, dweight = (dy_rows @ matrix.float()).view(half.shape), dy_rows.mT @ x_rows
        return dx.to(ctx.types[0]), dweight.to(ctx.types[1])


def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Softmax attention, causal or over all keys, (B, H, T, E), in the type of v: torch's fused kernel, but in bf16 on a CPU

    A single query is the last token, and sees every key.

    * without bf16 instructions the fused kernel in float32,
    * with them plain products at short lengths.
    """
    H, K, dtype = q_BHTE.shape[1], k_BKTE.shape[1], v_BKTE.dtype
    half = v_BKTE.device.type == "cpu" and dtype == torch.bfloat16
    inner = torch.float32 if half and not bf16_instructions() else dtype
    q, k, v = (x.to(inner) for x in (q_BHTE, k_BKTE, v_BKTE))  # under autocast q and k come in float32
    if half and inner == dtype and q.shape[2] <= _PLAIN_LENGTH:
        k, v = (x.repeat_interleave(H // K, 1) if H > K else x for x in (k, v))
        return _plain(q, k, v, scale, causal)
    with torch.autocast(v.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, scale=scale, enable_gqa=H > K)
    return y.to(dtype)


def _plain(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, scale: float, causal: bool) -> Tensor:
    """Scale and mask ride along in the product; the softmax is in fp32."""
    B, H, T, _ = q_BHTE.shape
    mask_TT = torch.full((T, T), float("-inf") if causal else 0.0, dtype=q_BHTE.dtype, device=q_BHTE.device).triu(1)
    q, k, v = (x.flatten(0, 1) for x in (q_BHTE, k_BHTE, v_BHTE))
    score = torch.baddbmm(mask_TT.expand(B * H, T, T), q, k.mT, alpha=scale)
    y: Tensor = torch.bmm(score.softmax(-1, dtype=torch.float32).to(v.dtype), v).view(B, H, T, -1)
    return y


def feed_forward(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) · up x), or down(gelu(up x)) where there is no gate; of variants (V, ...) each with its own."""
    lifted = project(x, up)
    hidden = F.gelu(lifted) if gate is None else F.silu(project(x, gate)) * lifted
    return project(hidden, down)


def attention_by_kernel(x: Tensor, weights: Sequence[Tensor], modulation: Tensor | None = None) -> bool:
    """Whether a block's attention, from norm to sum, is one call of the native kernel: where that is faster.

    It needs a sequence for every thread, and one that stays in the cache.
    """
    if not _sublayer(x, weights, modulation) or x.shape[:-2].numel() < thread_count():
        return False
    if x.shape[-2:].numel() > _KERNEL_SEQUENCE:
        return False
    most = 2 * _KERNEL_HEADS if in_bf16(x) else _KERNEL_HEADS
    return max(weight.shape[-2:].numel() for weight in weights) <= most


def feed_forward_by_kernel(x: Tensor, weights: Sequence[Tensor | None], modulation: Tensor | None = None) -> bool:
    """Whether a block's dense feed-forward network, from norm to sum, is one call of the native kernel.

    Its products are torch's equals only while a matrix stays in the cache, but it makes no passes over memory in between. A modulated
    sequence stays with one thread, so that it needs one for every thread.
    """
    present = [weight for weight in weights if weight is not None]
    if not _sublayer(x, present, modulation):
        return False
    if modulation is not None and x.shape[:-2].numel() < thread_count():
        return False
    return in_bf16(x) or max(weight.shape[-2:].numel() for weight in present) <= _KERNEL_MATRIX


def _sublayer(x: Tensor, weights: Sequence[Tensor], modulation: Tensor | None) -> bool:
    """Whether the kernel can, and has products as fast as torch's: in training, of one model or of variants.

    In bf16 it has none for the matrix unit, which is torch's then.

    Weights and modulations that are more than tensors (DTensors) are for torch: they have no memory that the kernel could read.
    """
    if (
        not library.serves_training(x)
        or weights[0].shape[:-1] != x.shape[:-3]
        or any(
            type(tensor) not in (Tensor, Parameter)
            for tensor in (*weights, *([] if modulation is None else [modulation]))
        )
    ):
        return False
    if any(tensor.dtype != torch.float32 for tensor in (x, *weights)):
        return False
    return compute_dtype(x) == torch.float32 or (in_bf16(x) and (library.has_dot_products() or not bf16_instructions()))


def one_multiplier(x: Tensor) -> bool:
    """Whether all multipliers of a branch may be one number, anywhere in it: in training, of one model, while nobody watches."""
    return library.serves_training(x) and x.dim() == 3


def in_bf16(x: Tensor) -> bool:
    """Whether products with x are in bf16."""
    return compute_dtype(x) == torch.bfloat16
