"""Sublayers of a transformer block, x + c·f(norm x), by the native kernel: attention, and the dense feed-forward network.

Both also as a diffusion transformer has them (adaLN, 2212.09748), x + c·gate·f(norm x · (1 + scale) + shift), each sequence with a
shift, a scale and a gate of its own.

One call forward and one backward. At small widths much of what torch's way costs is not arithmetic: norms, RoPE, activations,
multipliers and sums are passes over memory, every operator is a launch, and its fused attention on a CPU reaches a tenth of
the processor's speed.

Weights of stacked variants have a leading axis of them, and so has x: a thread then takes whole variants where it can.

Shape suffixes: B sequences, T tokens, D width, H heads, K key/value heads, E head size; F the network's inner width.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mue.kernels import library


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("variants", "batch", "length", "width", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "products", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "residual", "eps")),
        *(
            (name, ctypes.c_void_p)
            for name in ("gain", "q", "k", "v", "q_gain", "k_gain", "o", "turn", "modulation", "x")
        ),
        *((name, ctypes.c_void_p) for name in ("out", "qkv", "y", "log_sum", "branch")),
        *((name, ctypes.c_void_p) for name in ("dout", "dx", "dmodulation", "gradients")),
    ]


class _FeedForward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("variants", "rows", "length", "width", "inner", "products", "threads")),
        *((name, ctypes.c_double) for name in ("residual", "eps")),
        *((name, ctypes.c_void_p) for name in ("gain", "gate", "up", "down", "modulation", "x")),
        *((name, ctypes.c_void_p) for name in ("out", "gate_rows", "up_rows", "branch")),
        *((name, ctypes.c_void_p) for name in ("dout", "dx", "dmodulation", "gradients")),
    ]


_FLOATS, _ROUNDED, _HALVES = range(3)  # csrc/api.h, Products


def _products() -> int:
    """In bf16: by the processor's instructions for it, else in float32 with both sides rounded."""
    return _HALVES if library.has_dot_products() else _ROUNDED


@dataclass(frozen=True)
class _Kernel:
    """One sublayer's C interface.

    Attributes:
        structure: its call. given: the fields of the tensors it is given after x, of which the last is the modulation. kept: of
            those that forward leaves for backward. numbers: of its floats.
        sizes: its integers, from x and what is given.
        shapes: of what is kept.
    """

    name: str
    structure: type[ctypes.Structure]
    given: tuple[str, ...]
    kept: tuple[str, ...]
    numbers: tuple[str, ...]
    sizes: Callable[[Tensor, Sequence[Tensor]], dict[str, int]]
    shapes: Callable[[Tensor, Sequence[Tensor]], list[tuple[int, ...]]]

    def results(self, x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """Memory for the result and for what is kept."""
        return [torch.empty_like(x), *(x.new_empty(shape) for shape in self.shapes(x, given))]

    def run(
        self, way: str, x: Tensor, given: Sequence[Tensor], numbers: Sequence[float], half: bool, **more: Tensor
    ) -> None:
        """`way`: forward or backward; `more`: other tensors by field."""
        loaded = library.loaded()
        assert loaded is not None  # library.serves_training
        products = _products() if half else _FLOATS
        call: Any = self.structure(
            products=products, **self.sizes(x, given), **dict(zip(self.numbers, numbers, strict=True))
        )
        for name, tensor in (("x", x), *zip(self.given, given, strict=True), *more.items()):
            setattr(call, name, tensor.data_ptr() if tensor.numel() else None)
        if status := getattr(loaded, f"mue_{self.name}_{way}")(ctypes.byref(call)):
            raise MemoryError(f"the native {self.name} found no memory or no threads (status {status})")

    def differentiated(
        self, dout: Tensor, x: Tensor, given: Sequence[Tensor], kept: Sequence[Tensor], numbers: Sequence[float], half: bool
    ) -> list[Tensor]:  # fmt: skip
        """The gradients: of x, of the modulation, and of all weights, these one after the other (of each variant)."""
        found = self.gradients(x, given)
        more = dict(zip(("dx", "dmodulation", "gradients"), found, strict=True))
        self.run(
            "backward",
            x,
            given,
            numbers,
            half,
            **dict(zip(self.kept, kept, strict=True)),
            dout=dout.contiguous(),
            **more,
        )
        return found

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x, what is given and what is kept: the order in which both forms save for the backward."""
        count = 1 + len(self.given)
        return tensors[0], list(tensors[1:count]), list(tensors[count:])

    def weights(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What is trained: all but the table of RoPE and the modulation."""
        return [t for name, t in zip(self.given, given, strict=True) if name not in ("turn", "modulation")]

    def gradients(self, x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """Memory for the gradients of x, of the modulation and of all weights."""
        lead = _lead(given)
        # one buffer, one weight after the other, as the threads' own sums lie (csrc/attention.cpp)
        size = sum(w.numel() for w in self.weights(given)) // math.prod(lead)
        return [torch.empty_like(x), torch.empty_like(given[-1]), x.new_empty((*lead, size))]

    def apart(self, dmodulation: Tensor, gradients: Tensor, given: Sequence[Tensor]) -> list[Tensor | None]:
        """A gradient for each of what is given."""
        weights, variants = self.weights(given), math.prod(_lead(given))
        parts = gradients.split_with_sizes([w.numel() // variants for w in weights], -1)
        found: list[Tensor | None] = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
        return [*found, *[None] * (len(given) - 1 - len(found)), dmodulation]


def _operator(kernel: _Kernel) -> Callable[[Tensor, list[Tensor], list[float], bool], Tensor]:
    """The differentiable function made of a kernel: eagerly an autograd.Function, else `torch.ops.mue.{name}`.

    (Both, because an operator takes longer to call.)
    """

    # The backward has none of its own (once_differentiable): a second derivative is refused, instead of being zero.
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, numbers: list[float], half: bool, x: Tensor, *given: Tensor) -> Tensor:
            y, *kept = results = kernel.results(x, given)
            kernel.run("forward", x, given, numbers, half, **dict(zip(("out", *kernel.kept), results, strict=True)))
            ctx.save_for_backward(x, *given, *kept)
            ctx.numbers, ctx.half = numbers, half
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
            x, given, kept = kernel.split(ctx.saved_tensors)
            dx, dmodulation, gradients = kernel.differentiated(dout, x, given, kept, ctx.numbers, ctx.half)
            return None, None, dx, *kernel.apart(dmodulation, gradients, given)

    @torch.library.custom_op(f"mue::{kernel.name}", mutates_args=())
    def compiled(x: Tensor, given: list[Tensor], numbers: list[float], half: bool) -> list[Tensor]:
        results = kernel.results(x, given)
        kernel.run("forward", x, given, numbers, half, **dict(zip(("out", *kernel.kept), results, strict=True)))
        return results

    @torch.library.custom_op(f"mue::{kernel.name}_backward", mutates_args=())
    def backward(
        dout: Tensor, x: Tensor, given: list[Tensor], kept: list[Tensor], numbers: list[float], half: bool
    ) -> list[Tensor]:  # fmt: skip
        return kernel.differentiated(dout, x, given, kept, numbers, half)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        x, given, ctx.numbers, ctx.half = inputs
        ctx.save_for_backward(x, *given, *output[1:])

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        x, given, kept = kernel.split(ctx.saved_tensors)
        dx, dmodulation, gradients = backward(grads[0], x, given, kept, ctx.numbers, ctx.half)
        return dx, kernel.apart(dmodulation, gradients, given), None, None

    compiled.register_fake(lambda x, given, *_: kernel.results(x, given))
    backward.register_fake(lambda dout, x, given, *_: kernel.gradients(x, given))
    compiled.register_autograd(differentiate, setup_context=keep)
    named: Any = type(f"native_{kernel.name}", (Eager,), {})  # what a profile shows

    def run(x: Tensor, given: list[Tensor], numbers: list[float], half: bool) -> Tensor:
        x, given = x.contiguous(), [tensor.contiguous() for tensor in given]
        y: Tensor = (
            compiled(x, given, numbers, half)[0]
            if torch.compiler.is_compiling()
            else named.apply(numbers, half, x, *given)
        )
        return y

    return run


def _lead(given: Sequence[Tensor]) -> tuple[int, ...]:
    """The axis of variants, or none: before the width of the norm's gain."""
    return given[0].shape[:-1]


def _attention_sizes(x: Tensor, given: Sequence[Tensor]) -> dict[str, int]:
    (B, T, D), (_, q, k, _, gain_E, *_), variants = x.shape[-3:], given, math.prod(_lead(given))
    E = gain_E.shape[-1]
    return {
        "variants": variants, "batch": B, "length": T, "width": D, "heads": q.shape[-2] // E, "kv_heads": k.shape[-2] // E,
        # a sequence stays with one thread from the norm to the sum, so there are no more threads than sequences
        "head_dim": E, "threads": min(torch.get_num_threads(), variants * B),
    }  # fmt: skip


def _attention_kept(x: Tensor, given: Sequence[Tensor]) -> list[tuple[int, ...]]:
    (*lead, T, _), heads, each = x.shape, given[1].shape[-2], given[2].shape[-2]
    sums = *lead, heads // given[4].shape[-1], T
    return [(*lead, T, heads + 2 * each), (*lead, T, heads), sums, _branch(x, given)]


def _feed_forward_sizes(x: Tensor, given: Sequence[Tensor]) -> dict[str, int]:
    variants, inner, rows = math.prod(_lead(given)), given[2].shape[-2], math.prod(x.shape[:-1])
    threads = max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
    return {
        "variants": variants, "rows": rows // variants, "length": x.shape[-2] if x.dim() > 1 else 1, "width": x.shape[-1], "inner": inner,
        "threads": threads,
    }  # fmt: skip


def _feed_forward_kept(x: Tensor, given: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [*((*x.shape[:-1], w.shape[-2]) if w.numel() else (0,) for w in given[1:3]), _branch(x, given)]


def _branch(x: Tensor, given: Sequence[Tensor]) -> tuple[int, ...]:
    """What a gate multiplies, where there is one."""
    return tuple(x.shape) if given[-1].numel() else (0,)


_ROWS_PER_THREAD = 32  # of the feed-forward, below which another thread costs more than it saves
_attention = _operator(
    _Kernel(
        "attention", _Attention, ("gain", "q", "k", "v", "q_gain", "k_gain", "o", "turn", "modulation"),
        ("qkv", "y", "log_sum", "branch"), ("scale", "residual", "eps"), _attention_sizes, _attention_kept,
    )
)  # fmt: skip
_feed_forward = _operator(
    _Kernel(
        "feed_forward", _FeedForward, ("gain", "gate", "up", "down", "modulation"), ("gate_rows", "up_rows", "branch"),
        ("residual", "eps"), _feed_forward_sizes, _feed_forward_kept,
    )
)  # fmt: skip


def attention(
    x_BTD: Tensor,
    weights: Sequence[Tensor],
    rope: Tensor | None,
    *,
    scale: float,
    residual: float,
    eps: float,
    half: bool = False,
    modulation: Tensor | None = None,
) -> Tensor:
    """x + residual · o(softmax attention of norm x), with RMSNorm of every head's q and k: over the past with RoPE, or over all tokens.

    Args:
        x_BTD: in float32 on the CPU, as everything else.
        weights: the norm's gain (D,), q (H·E, D), k and v (K·E, D), the gains of q and k (E,), o (D, H·E).
        rope: (T, 1, E/2, 2), cos and sin of the angle by which neighbouring pairs are turned. (Of all variants.) None: tokens have no
            order, and each attends to all.
        scale: of the logits.
        half: products in bf16 (where there are no instructions for it, in float32 with what they take and give rounded).
        modulation: (B, 3 D), of variants (V, B, 3 D): of each sequence the shift and the scale of norm x, and the gate of what is added.

    Raises:
        ValueError: a modulation of another shape; none is broadcast, since the kernel would read and write past its end.
    """
    _check(x_BTD, modulation)
    return _attention(x_BTD, _filled(x_BTD, *weights, rope, modulation), [scale, residual, eps], half)


def feed_forward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    *,
    residual: float,
    eps: float,
    half: bool = False,
    modulation: Tensor | None = None,
) -> Tensor:
    """x + residual · down(silu(gate n) · up n) of n = norm x; without a gate gelu(up n).

    Args:
        x: (..., D), with a modulation (B, T, D), in float32 on the CPU, as everything else.
        weights: the norm's gain (D,), gate (F, D) or None, up (F, D), down (D, F).
        half, modulation: see `attention`, which raises the same.
    """
    _check(x, modulation)
    return _feed_forward(x, _filled(x, *weights, modulation), [residual, eps], half)


def _check(x: Tensor, modulation: Tensor | None) -> None:
    """Refuses a modulation that has not three rows of D for each sequence of x."""
    if modulation is None:
        return
    wanted = (*x.shape[:-2], 3 * x.shape[-1])
    if x.dim() < 3 or tuple(modulation.shape) != wanted:
        raise ValueError(
            f"a modulation of shape {tuple(modulation.shape)} beside x of shape {tuple(x.shape)}: give {wanted}, a shift, a scale and a gate"
            " for each sequence (expand one that is for all)"
        )


def _filled(x: Tensor, *given: Tensor | None) -> list[Tensor]:
    """An operator takes tensors only: an empty one stands for None."""
    return [x.new_empty(0) if tensor is None else tensor for tensor in given]
