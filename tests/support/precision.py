"""How far two computations of the same numbers may lie apart when only the order of their roundings differs.

**What is the same to the bit**, and is compared so: drawn weights, the order of the data, integers (routing, counts), files,
and everything a run writes when it is resumed on the same machine with the same number of threads. That rests on torch
giving out memory on 64-byte boundaries: equal shapes, threads and alignment are equal instructions in an equal order.

**What is not**: products of tensors that lie elsewhere (safetensors are read through a mapping of the file, where a tensor
begins at any multiple of 8 bytes), on other threads, in another process that has other threads, or along another path
through the code. Vector loops then begin and end elsewhere, and a sum is rounded in another order.

The bound: a sum of n products computed in any order is off by at most n·u·Σ|terms|, with u = eps/2 (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., 3.1), so two orders lie at most n·eps·Σ|terms| apart. The terms are not at hand,
the result is: terms of random signs sum to about Σ|terms|/√n, while the roundings, of random signs too, sum to about √n of
them and not n (section 2.8 there). Both together give n·eps times the size of the result, where a tensor's size is its
largest entry: small entries are differences of terms as large as those of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(dtype: torch.dtype, operations: int) -> float:
    """The bound above, relative to a result's size: ``operations`` roundings of a type one after another. Integers are exact."""
    return operations * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two entries, relative to the largest entry of what is expected (0 where they are the same)."""
    if found.shape != expected.shape:
        raise AssertionError(f"shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    if torch.equal(found, expected):
        return 0.0
    exact = expected.detach().double()
    size = float(exact.abs().max())
    return float((found.detach().double() - exact).abs().max()) / size if size else math.inf


def norm_off(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to that of what is exact: the error of all entries together."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def close(found: Tensor, expected: Tensor, *, operations: int) -> bool:
    """Whether two tensors are equal but for the order of ``operations`` roundings.

    Args:
        found: the result in question.
        expected: what it should be, of the same type and shape.
        operations: how many roundings lie one after another between what both computations start from (to the bit) and an
            entry of the result: the lengths of the sums on the way, added up over layers and steps.
    """
    if found.dtype != expected.dtype:
        raise AssertionError(f"{found.dtype} and {expected.dtype}")
    return off(found, expected) <= rounding(expected.dtype, operations)
