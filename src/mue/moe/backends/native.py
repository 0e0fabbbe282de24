"""The native backend: routed and shared experts in one C++ call, forward and backward.

What the kernel does (api.h to entry.cpp beside this file): counts the pairs into expert order, gives every thread rows of
equal cost (an expert across a border is divided, so one popular expert does not hold everybody up), and takes 120 rows at
a time through gather, products, SwiGLU and routing weight while they are in the cache; the combine is one gather-and-sum
per token, without atomics, so that the same threads give the same bits. Saved for the backward: gate x and up x.

Weights are read as they are stored: under autocast there is no copy of them in bf16, and their gradients come in their
own type. bf16 goes to the processor's bf16 instructions or its matrix unit, else through float inside the kernel
(`mue.kernels.library.engine`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mue.kernels import build as builder
from mue.kernels import library
from mue.moe.backends.operator import Differentiable, Kernel, RoutedCall, operator
from mue.moe.expert_weights import ExpertWeights

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
# "tile model" is the matrix unit's code with the unit played by plain C++, for tests elsewhere (docs/performance.md).
_ENGINES = {"plain": 0, "dot products": 1, "matrix unit": 2, "tile model": 3}
# A matrix larger than this is packed per expert into too much memory, and large products are fast everywhere.
_LARGEST_MATRIX = 1 << 22
_PLAIN_MATRIX = 1 << 15  # elements of a matrix up to which the kernel's float32 is as fast as torch's bf16 (is_slower)
TRIAL = "mue.moe.kernel_trial"  # what a built library is tried with before it is used
_WORK_PER_THREAD = 1 << 18  # multiplications of one matrix below which another thread does not pay


class _Ffn(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "inner")),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "down", "gate_MH", "up_MH", "dgate", "dup", "ddown")),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "width", "pairs", "slots")),
        *((name, ctypes.c_int64) for name in ("row_type", "x_type", "matrix_type", "weight_type", "engine", "threads")),
        *((name, ctypes.c_void_p) for name in ("token_P", "expert_P", "weight_P", "x_TD", "dy_TD")),
        *((name, ctypes.c_void_p) for name in ("y_TD", "dx_TD", "dweight_P")),
        ("routed", _Ffn),
        ("shared", _Ffn),
    ]


def refusal(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot or should not compute this; None where it can."""
    if x_TD.device.type != "cpu":
        return f"the native backend runs on the CPU, not on {x_TD.device.type}"
    if not library.built():
        return "the native kernel is not built: run `mue doctor --build`"
    matrices = [matrix for matrix in weights.matrices if matrix is not None]
    types = {dtype, x_TD.dtype, *(matrix.dtype for matrix in matrices)}
    if not all(kind in _TYPES for kind in types) or len({matrix.dtype for matrix in matrices}) > 1:
        return f"the native backend computes in float32, float64 and bfloat16, got {sorted(map(str, types))}"
    if max(matrix.shape[-1] * matrix.shape[-2] for matrix in matrices) > _LARGEST_MATRIX:
        return f"the native backend is for matrices of up to {_LARGEST_MATRIX} elements"
    return None


def is_slower(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether the portable backend is the faster of ours: in bf16 where torch has instructions for it and the kernel has not.

    Measured (docs/performance.md): d128 h128 1.48 to 1.38 of the dense FFN with one thread and 1.65 to 2.42 with two, d256
    h256 1.81 to 1.16 and 1.72 to 1.66, d512 h256 2.27 to 1.42 and 2.89 to 2.21. In all other cells the kernel is faster.
    """
    if dtype != torch.bfloat16 or not library.bf16_instructions():
        return False
    shapes = [matrix.shape[-2:] for matrix in weights.matrices if matrix is not None]
    plain = library.bf16_is_plain() or not all(_in_blocks(*shape) for shape in shapes)
    return plain and max(shape.numel() for shape in shapes) > _PLAIN_MATRIX


def _in_blocks(*widths: int) -> bool:
    # bf16 is laid out in blocks of 32, a row of the matrix unit's tiles; other widths take the plain engine
    return all(width % 32 == 0 for width in widths)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _call(inputs: Differentiable, routed: RoutedCall, saved: Sequence[Tensor] | None, **more: Tensor | None) -> _Call:
    """The arguments that forward and backward share; `more` are pointers by field."""
    x_TD, up = inputs.x_TD, inputs.up if inputs.up is not None else inputs.shared_up
    assert up is not None
    call = _Call(
        tokens=x_TD.shape[0], width=x_TD.shape[1], pairs=routed.token_P.shape[0], slots=routed.slots,
        row_type=_TYPES[routed.dtype], x_type=_TYPES[x_TD.dtype], matrix_type=_TYPES[up.dtype],
        weight_type=_TYPES[inputs.weight_P.dtype],
    )  # fmt: skip
    # gate x and up x of the routed rows, then of the shared ones (mue.moe.backends.operator.Kernel)
    kept = [None] * 4 if saved is None else list(saved)
    for ffn, count, matrices, (gate, up_rows) in (
        (call.routed, routed.number, inputs[2:5], kept[:2]),
        (call.shared, 1, inputs[5:8], kept[2:]),
    ):
        if matrices[1] is None:
            continue
        ffn.count, ffn.inner = count, matrices[1].shape[-2]
        ffn.gate, ffn.up, ffn.down = map(_pointer, matrices)
        ffn.gate_MH, ffn.up_MH = _pointer(gate), _pointer(up_rows)
    given = {"token_P": routed.token_P, "expert_P": routed.expert_P, "weight_P": inputs.weight_P, "x_TD": x_TD}
    for name, tensor in {**given, **more}.items():
        setattr(call, name, _pointer(tensor))
    inner = [ffn.inner for ffn in (call.routed, call.shared) if ffn.count]
    bf16 = routed.dtype == torch.bfloat16 and _in_blocks(call.width, *inner)
    call.engine = _ENGINES[library.engine() if bf16 else "plain"]
    work = call.width * (call.pairs * call.routed.inner + call.tokens * call.shared.inner)
    call.threads = max(1, min(torch.get_num_threads(), work // _WORK_PER_THREAD))
    return call


def _run(entry: str, call: _Call, routed: RoutedCall) -> None:
    """Call the library; what is wrong with indices it finds while it sorts them, and says by a number."""
    kernel = library.loaded()
    assert kernel is not None  # refusal
    assert kernel.mue_call_bytes() == ctypes.sizeof(_Call)  # api.h and the fields above say the same
    status = getattr(kernel, entry)(ctypes.byref(call))
    if status == 0:
        return
    if status == 1:
        raise ValueError("expert_P holds a negative index: padding is marked by num_experts")
    if status == 2:
        raise ValueError(
            f"expert_P reaches {int(routed.expert_P.max())} but there are {routed.number} experts"
            f" (padding is {routed.number})"
        )
    if status == 3:
        raise ValueError(f"token_P reaches outside the {call.tokens} tokens of x")
    if status == 4:
        raise ValueError(f"slots={routed.slots} promises token_P = 0,0,..,1,1,..: give slots=0 for any other order")
    raise MemoryError(f"the native kernel found no memory for {call.tokens} tokens (status {status})")


def _forward(inputs: Differentiable, routed: RoutedCall, saved: list[Tensor] | None) -> tuple[Tensor, None]:
    # empty: the combine writes every token once, also one without pairs
    y_TD = inputs.x_TD.new_empty(inputs.x_TD.shape, dtype=routed.dtype)
    _run("mue_forward", _call(inputs, routed, saved, y_TD=y_TD), routed)
    return y_TD, None


def _backward(
    dy_TD: Tensor, inputs: Differentiable, routed: RoutedCall, saved: Sequence[Tensor], needs: Sequence[bool], _: None
) -> list[Tensor | None]:
    gradients = [
        None if tensor is None or not need else torch.empty_like(tensor)
        for tensor, need in zip(inputs, needs, strict=True)
    ]
    dx_TD, dweight_P, *matrices = gradients
    if dweight_P is not None and routed.token_P.shape[0]:
        dweight_P.zero_()  # padding pairs have no row
    call = _call(inputs, routed, saved, dy_TD=dy_TD, dx_TD=dx_TD, dweight_P=dweight_P)
    for ffn, given in ((call.routed, matrices[:3]), (call.shared, matrices[3:])):
        ffn.dgate, ffn.dup, ffn.ddown = map(_pointer, given)
    _run("mue_backward", call, routed)
    return gradients


run = operator("experts_native", Kernel(_forward, _backward, lambda routed: routed.token_P.shape[0]))


def build() -> Path:
    """The library, built now if it is not there; see :func:`mue.kernels.build.build`."""
    path = builder.build(TRIAL)
    library.forget()  # it may have been looked for, in vain, before
    return path


def main() -> None:
    """What ``make`` calls: builds, or says why not and what happens then; never an error."""
    try:
        print(f"native MoE kernel: {build()}")
    except (ValueError, builder.BuildError) as problem:
        print(f"no native kernel, MoE layers will use the portable backend (later: mue doctor --build): {problem}")
