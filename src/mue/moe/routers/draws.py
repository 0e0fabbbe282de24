"""Random numbers as a pure function of what they are for: the same bits on every device, in any order, after any interruption.

A generator's state would have to be kept for each layer, put back for a recomputed forward pass and shared out to stacked
variants. A counter-based draw (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) needs none of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Key = int | Tensor  # int64

_WEYL = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number: its multiples are far apart
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, signed
_ALL = (1 << 64) - 1


def bits(*keys: Key, device: torch.device | None = None) -> Tensor:
    """63 random bits for each combination of keys.

    Args:
        keys: whole numbers or int64 tensors that broadcast; their order counts.

    Returns:
        int64 in [0, 2^63), of the keys' joint shape.
    """
    known, rest = 0, list(keys)
    while rest and (number := _number(rest[0])) is not None:
        # seeds, layers, steps and the like: numbers of Python are mixed in microseconds, tensors of one number are not
        known, rest = _mixed_number((known ^ number) + _WEYL), rest[1:]
    state = torch.full((), known - (known >> 63 << 64), dtype=torch.int64, device=device)
    for key in rest:
        # whole numbers of Python may be larger than an int64, which torch would refuse
        state = _mixed((state ^ (key if isinstance(key, Tensor) else key % (1 << 63))).add_(_WEYL))
    return state & 0x7FFF_FFFF_FFFF_FFFF


def uniform(*keys: Key, device: torch.device | None = None) -> Tensor:
    """Like :func:`bits`, as float32 in [0, 1): the 24 highest bits, which a float32 holds exactly."""
    return (bits(*keys, device=device) >> 39).float() * 2.0**-24  # 63 bits, of which 24 stay


def _number(key: Key) -> int | None:
    """A key as a number of Python, unsigned; None of many, and of one that lies on a device or is nobody's to see."""
    if isinstance(key, int):
        return key % (1 << 63)
    # reading one waits for a device, breaks a compiled graph and is refused by tensors without data
    if key.dim() or not key.is_cpu or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    return int(key) & _ALL


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection in which every bit depends on every other.

    int64 products wrap around in torch, as unsigned ones do. ``x`` is overwritten.
    """
    x = x.bitwise_xor_(_shifted(x, 30)).mul_(_FACTORS[0])
    x = x.bitwise_xor_(_shifted(x, 27)).mul_(_FACTORS[1])
    return x.bitwise_xor_(_shifted(x, 31))


def _mixed_number(x: int) -> int:
    """The same of an unsigned number of Python."""
    x &= _ALL
    x = ((x ^ x >> 30) * _FACTORS[0]) & _ALL
    x = ((x ^ x >> 27) * _FACTORS[1]) & _ALL
    return x ^ x >> 31


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count without the sign: torch's shift copies it."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)
