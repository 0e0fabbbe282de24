"""The native library: found, loaded, and asked what it can do."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mue.kernels import build
from mue.kernels.operator import constant


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The kernel, loaded; None where it has not been built."""
    path = build.find()
    return None if path is None else load(path)


def load(path: Path) -> ctypes.CDLL:
    """The kernel at `path`, with the types of the results that are no C int."""
    kernel = ctypes.CDLL(str(path))
    kernel.mue_has_dot.restype = ctypes.c_bool
    kernel.mue_matrix_unit.restype = kernel.mue_call_bytes.restype = ctypes.c_int64
    return kernel


_NO_UNIT, _REFUSED, _GIVEN = range(3)  # processor.h, MatrixUnit


def offered(kernel: ctypes.CDLL) -> list[str]:
    """Those of `build.ENGINES` that this processor has and its system lets us use."""
    has = {"plain": True, "dot products": kernel.mue_has_dot(), "matrix unit": kernel.mue_matrix_unit() == _GIVEN}
    return [name for name in build.ENGINES if has[name]]


@functools.cache
def engine() -> str:
    """How bf16 products are computed here: the best of `build.ENGINES` that the processor offers and that passed its trial.

    "plain" is float32 inside the kernel.
    """
    path, kernel = build.find(), loaded()
    if path is None or kernel is None:
        return "plain"
    passed = build.engines(path)
    return [name for name in offered(kernel) if name in passed][-1]


def why_engine() -> str:
    """What `engine` took, and why nothing better, in words."""
    path, kernel, taken = build.find(), loaded(), engine()
    assert path is not None and kernel is not None
    dot = "bfmmla" if platform.machine() in ("aarch64", "arm64") else "vdpbf16ps"
    words = {
        "plain": "float32 inside the kernel",
        "dot products": f"the processor's instructions ({dot})",
        "matrix unit": "the matrix unit (AMX)",
    }
    refused = kernel.mue_matrix_unit() == _REFUSED
    missing = {
        "dot products": "this processor has none, or the compiler knew none",
        "matrix unit": "the system refused its registers (arch_prctl)" if refused else "this processor has none",
    }
    there = offered(kernel)
    better = build.ENGINES[build.ENGINES.index(taken) + 1 :]
    reasons = [f"no {name}: {'failed its trial' if name in there else missing[name]}" for name in better]
    if taken != "dot products" and bf16_instructions():  # mue.lab.models.ops
        reasons.append(
            "bf16 attention and dense feed-forward networks are torch's: the kernel has them by dot products only"
        )
    return "; ".join([words[taken], *reasons])


def forget() -> None:
    """Looks for the library again at its next use: it has been built meanwhile."""
    loaded.cache_clear()
    engine.cache_clear()


@constant
def built() -> bool:
    """Whether there is a library; a constant to torch.compile."""
    return loaded() is not None


@constant
def bf16_instructions() -> bool:
    """Whether this processor multiplies bf16; one that does not takes four times as long for it as for float32."""
    facts = torch.cpu.get_capabilities()
    return any(facts.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@constant
def has_dot_products() -> bool:
    """Whether bf16 products go through the processor's instructions for them; a constant to torch.compile."""
    return engine() == "dot products"


@constant
def bf16_is_plain() -> bool:
    """Whether bf16 products go through float32 inside the kernel; a constant to torch.compile."""
    return engine() == "plain"


def serves_training(x: Tensor) -> bool:
    """Whether the lesser kernels (norm, attention) serve x: on the CPU, where built, where a backward follows and nobody watches.

    Without a backward torch's operators are taken: validation has to give a run the same bits alone and in a stack of
    variants.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or x.numel() == 0 or not built():
        return False
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is None
