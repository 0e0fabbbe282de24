"""Parts of a router by the native kernel: the best experts of every token, their weights, and the statistics of a routing.

They are small, but torch takes a dozen operators for each. All give None where torch has to do it: off the CPU, in other
types than float32, without the kernel, under torch.compile and where somebody watches the operators.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mue.kernels import library
from mue.moe.routing import Routing

_ELEMENTS_PER_THREAD = 1 << 14  # of the (T, N) table, below which another thread costs more than it saves


class _Selection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "active", "groups", "threads")),
        *((name, ctypes.c_void_p) for name in ("score", "best")),
    ]


class _Gates(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "active", "sigmoid", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("logit_TN", "expert_TK", "weight_TK", "dweight_TK", "dlogit_TN")),
    ]


class _RoutingStats(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "slots")),
        *((name, ctypes.c_void_p) for name in ("expert_P", "weight_P", "load_N", "found")),
    ]


def _kernel(x: Tensor) -> ctypes.CDLL | None:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    # an observer (mue.check, FakeTensor) has to see operators, and a call by ctypes is none
    return library.loaded() if _get_current_dispatch_mode() is None else None


def select_top(score_TN: Tensor, active: int, groups: int) -> Tensor | None:
    """The indices that `mue.moe.routers.ops.select_top` gives, ties included."""
    if _kernel(score_TN) is None:
        return None
    score_TN = score_TN.contiguous()
    tokens, experts = score_TN.shape
    best_TK = torch.empty(tokens, active, dtype=torch.int64)
    _run("mue_select", _Selection(tokens, experts, active, groups, _threads(score_TN)), score=score_TN, best=best_TK)
    return best_TK


def gates(logit_TN: Tensor, expert_TK: Tensor, sigmoid: bool, scale: float) -> Tensor | None:
    """scale · softmax over each token's experts of their logits, or of the logarithms of their sigmoids."""
    if _kernel(logit_TN) is None:
        return None
    weight_TK: Tensor = NativeGates.apply(logit_TN.contiguous(), expert_TK.contiguous(), sigmoid, scale)  # type: ignore[no-untyped-call]
    return weight_TK


class NativeGates(torch.autograd.Function):
    """See `gates`; the name is what a profile shows."""

    @staticmethod
    def forward(ctx: Any, logit_TN: Tensor, expert_TK: Tensor, sigmoid: bool, scale: float) -> Tensor:
        weight_TK = torch.empty(expert_TK.shape)
        ctx.numbers = *logit_TN.shape, expert_TK.shape[1], sigmoid, _threads(logit_TN), scale
        _run("mue_gates_forward", _Gates(*ctx.numbers), logit_TN=logit_TN, expert_TK=expert_TK, weight_TK=weight_TK)
        ctx.save_for_backward(logit_TN, expert_TK, weight_TK)
        return weight_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight_TK: Tensor) -> tuple[Tensor, None, None, None]:
        logit_TN, expert_TK, weight_TK = ctx.saved_tensors
        dlogit_TN = torch.empty_like(logit_TN)
        _run(
            "mue_gates_backward", _Gates(*ctx.numbers), logit_TN=logit_TN, expert_TK=expert_TK, weight_TK=weight_TK,
            dweight_TK=dweight_TK.contiguous(), dlogit_TN=dlogit_TN,
        )  # fmt: skip
        return dlogit_TN, None, None, None


def _threads(table: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), table.numel() // _ELEMENTS_PER_THREAD))


def _run(entry: str, call: ctypes.Structure, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
    if status := getattr(library.loaded(), entry)(ctypes.byref(call)):
        raise RuntimeError(f"{entry} found no threads (status {status})")


def routing_stats(routing: Routing) -> dict[str, Tensor] | None:
    """What `mue.moe.routing.routing_stats` gives; of a routing with `slots`, for the kernel adds up each token's own pairs."""
    if not routing.slots or (kernel := _kernel(routing.weight_P)) is None:
        return None
    expert_P, weight_P = routing.expert_P.contiguous(), routing.weight_P.detach().contiguous()
    load_N, found = torch.empty(routing.num_experts, dtype=torch.int64), torch.empty(4)
    pointers = (tensor.data_ptr() for tensor in (expert_P, weight_P, load_N, found))
    kernel.mue_routing_stats(
        ctypes.byref(_RoutingStats(routing.num_tokens, routing.num_experts, routing.slots, *pointers))
    )
    names = ("load_min", "load_max", "gate_sum", "variance_factor")
    return {"load": load_N, **dict(zip(names, found.unbind(), strict=True))}
