"""Parts of a router by the native kernel: the best experts of every token, and the statistics of a routing.

They are small, but torch takes a dozen operators for each. Both give None where torch has to do it: off the CPU, in other
types than float32, without the kernel, under torch.compile and where somebody watches the operators.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mue.moe import native
from mue.moe.routing import Routing

_ELEMENTS_PER_THREAD = 1 << 14


class _Selection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "active", "groups", "threads")),
        *((name, ctypes.c_void_p) for name in ("score", "best")),
    ]


class _RoutingStats(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "slots")),
        *((name, ctypes.c_void_p) for name in ("expert_P", "weight_P", "load_N", "found")),
    ]


def _kernel(x: Tensor) -> ctypes.CDLL | None:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    return native.library() if _get_current_dispatch_mode() is None else None


def select_top(score_TN: Tensor, active: int, groups: int) -> Tensor | None:
    """The indices that `mue.moe.router.select_top` gives, ties included."""
    if (kernel := _kernel(score_TN)) is None:
        return None
    score_TN = score_TN.contiguous()
    tokens, experts = score_TN.shape
    best_TK = torch.empty(tokens, active, dtype=torch.int64)
    threads = max(1, min(torch.get_num_threads(), score_TN.numel() // _ELEMENTS_PER_THREAD))
    call = _Selection(tokens, experts, active, groups, threads, score_TN.data_ptr(), best_TK.data_ptr())
    if status := kernel.mue_select(ctypes.byref(call)):
        raise RuntimeError(f"mue_select found no threads (status {status})")
    return best_TK


def routing_stats(routing: Routing) -> dict[str, Tensor] | None:
    """What `mue.moe.routing.routing_stats` gives, of a routing with `slots`."""
    if (kernel := _kernel(routing.weight_P)) is None:
        return None
    assert routing.slots
    expert_P, weight_P = routing.expert_P.contiguous(), routing.weight_P.detach().contiguous()
    load_N, found = torch.empty(routing.num_experts, dtype=torch.int64), torch.empty(4)
    pointers = (tensor.data_ptr() for tensor in (expert_P, weight_P, load_N, found))
    kernel.mue_routing_stats(
        ctypes.byref(_RoutingStats(routing.num_tokens, routing.num_experts, routing.slots, *pointers))
    )
    names = ("load_min", "load_max", "gate_sum", "variance_factor")
    return {"load": load_N, **dict(zip(names, found.unbind(), strict=True))}
