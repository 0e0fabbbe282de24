"""The native library: found, loaded, and asked what it can do."""

from __future__ import annotations

import ctypes
import functools
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
    """The kernel at `path`, with the types of the two results that are no C int."""
    kernel = ctypes.CDLL(str(path))
    kernel.mue_has_matrix_unit.restype = ctypes.c_bool
    kernel.mue_call_bytes.restype = ctypes.c_int64
    return kernel


@functools.cache
def engine() -> str:
    """How bf16 products are computed here: "matrix unit" where there is one and it passed its trial, else "plain"."""
    # A unit that did not pass its trial, or a library built where there was none, is left alone.
    path, kernel = build.find(), loaded()
    if path is None or kernel is None or not kernel.mue_has_matrix_unit():
        return "plain"
    return build.engines(path)[-1]


def forget() -> None:
    """Looks for the library again at its next use: it has been built meanwhile."""
    loaded.cache_clear()
    engine.cache_clear()


@constant
def built() -> bool:
    """Whether there is a library; a constant to torch.compile."""
    return loaded() is not None


def serves_training(x: Tensor) -> bool:
    """Whether the lesser kernels (norm, attention) serve x: on the CPU, where built, where a backward follows and nobody watches.

    Without a backward torch's operators are taken: validation has to give a run the same bits alone and in a stack of
    variants.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or x.numel() == 0 or not built():
        return False
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is None
