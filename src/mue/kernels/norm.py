"""RMSNorm, alone or with RoPE after it, by the native kernel: one pass over memory forward and one backward.

Torch makes a dozen of each on a CPU. Where the kernel cannot serve, `rms_norm` returns None and the caller takes torch's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mue.kernels import library

_TYPES = {torch.float32: 0, torch.bfloat16: 2}
_ELEMENTS_PER_THREAD = 1 << 15  # of x, below which another thread costs more than it saves


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "heads", "period", "x_type", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("gain", "turn", "x", "y", "inverse", "dy", "dx", "dgain")),
    ]


def rms_norm(x: Tensor, gain: Tensor, eps: float, rope: Tensor | None = None) -> Tensor | None:
    """x / rms(x) · gain over the last axis, in float32; None where torch has to do it.

    That is: under torch.compile (whose own fusion is as good), in other types, and see `library.serves_training`.

    Args:
        x: (..., E) in float32 or bf16; with `rope` (B, T, H, E).
        gain: (E,) in float32.
        rope: (T, 1, E/2, 2), cos and sin of the angle by which neighbouring pairs are then turned.
    """
    if (
        torch.compiler.is_compiling()
        or not library.serves_training(x)
        or x.dtype not in _TYPES
        or gain.dtype != torch.float32
    ):
        return None
    y: Tensor = NativeRMSNorm.apply(x, gain, eps, rope)  # type: ignore[no-untyped-call]
    return y


class NativeRMSNorm(torch.autograd.Function):
    """See `rms_norm`; the name is what a profile shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, rope: Tensor | None) -> Tensor:
        x, gain = x.contiguous(), gain.contiguous()
        y, inverse = torch.empty_like(x, dtype=torch.float32), torch.empty(x.shape[:-1])
        _run("mue_norm_forward", x, eps, rope, gain=gain, y=y, inverse=inverse)
        ctx.save_for_backward(x, gain, rope, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, gain, rope, inverse = ctx.saved_tensors
        dx, dgain = torch.empty_like(x) if ctx.needs_input_grad[0] else None, torch.empty_like(gain)
        _run("mue_norm_backward", x, ctx.eps, rope, gain=gain, inverse=inverse, dy=dy.contiguous(), dx=dx, dgain=dgain)
        return dx, dgain, None, None


def _run(entry: str, x: Tensor, eps: float, rope: Tensor | None, **more: Tensor | None) -> None:
    loaded = library.loaded()
    assert loaded is not None  # rms_norm
    width, threads = x.shape[-1], max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))
    call = _Norm(
        rows=x.numel() // width, width=width, heads=1, period=1, x_type=_TYPES[x.dtype], threads=threads, eps=eps
    )
    if rope is not None:
        assert rope.dtype == torch.float32 and rope.shape == (x.shape[1], 1, width // 2, 2) and rope.is_contiguous()
        call.heads, call.period = x.shape[2], x.shape[1]
    for name, tensor in {"x": x, "turn": rope, **more}.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    if status := getattr(loaded, entry)(ctypes.byref(call)):
        raise RuntimeError(f"{entry} found no threads (status {status})")
