"""What a step is held against: the machine's peak in products, the memory that a step takes, what it keeps for its backward."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

# Large enough that passes over memory are a small part of a product, and of several shapes: libraries differ in their best.
_SHAPES = ((1024, 1024, 1024), (2048, 1024, 512), (2048, 2048, 1024))


def peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 1.0) -> float:
    """The most multiplications and additions a second that torch's large products reach here, in 10⁹.

    Args:
        seconds: how long to look for the best.
    """
    best = 0.0
    for rows, columns, terms in _SHAPES:
        left, right = (
            torch.randn(rows, terms, device=device).to(dtype),
            torch.randn(terms, columns, device=device).to(dtype),
        )
        end = time.perf_counter() + seconds / len(_SHAPES)
        while True:
            start = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            best = max(best, 2e-9 * rows * columns * terms / (now - start))
            if now > end:
                break
    return best


def step_memory(step: Callable[[], object]) -> int | None:
    """Bytes by which the process grows while a step runs, gradients included; None where the system does not say (not Linux).

    Memory that a backend keeps between calls is there already, and does not count.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not reset.exists():
        return None
    step()
    for leaf in _leaves():
        leaf.grad = None
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc
        trim(0)  # what was freed goes back to the system, or a step would find it
    reset.write_text("5")  # the peak begins anew (proc(5))
    before = _kilobytes(status, "VmRSS")
    step()
    return max(0, _kilobytes(status, "VmHWM") - before) << 10


def _leaves() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) in (Tensor, Parameter) and x.is_leaf and x.requires_grad]


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name + ":"))


def kept_bytes(step: Callable[[], object], *given: Tensor) -> int:
    """Bytes of memory that the forward of a step keeps for its backward, beside parameters and what it is given.

    Args:
        step: forward and backward. given: tensors that are there anyway. (Leaves with gradients are, too.)
    """
    there = {x.untyped_storage().data_ptr() for x in (*_leaves(), *given)}
    kept: dict[int, Tensor] = {}  # the tensors, so that no memory is given out twice

    def pack(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved.detach())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        step()
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in there)
