"""The kernel's RMSNorm, with and without RoPE, against torch's in double precision; the same bits every time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mue.kernels import norm
from mue.lab.models.layers import RMSNorm, rotary_table
from mue.lab.models.ops import rotate
from support.precision import norm_off


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "turned"), [((5, 7), False), ((2, 3, 4, 6), True), ((3, 40, 4, 32), True), ((1, 3), False)]
)
def test_the_kernels_norm_is_torchs(shape: tuple[int, ...], turned: bool, dtype: torch.dtype) -> None:
    """Output, gradients of input and gain, with and without RoPE; widths that fill no vector too."""
    torch.manual_seed(0)
    x, gain = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    rope = rotary_table(shape[1], shape[-1]) if turned else None
    dy = torch.randn(shape)

    def run(function: Callable[[Tensor, Tensor], Tensor | None], kind: torch.dtype) -> list[Tensor]:
        leaves = [
            x.to(kind).requires_grad_(),
            gain.to(max(kind, torch.float32, key=lambda t: t.itemsize)).requires_grad_(),
        ]
        y = function(*leaves)
        assert y is not None
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def exact(x: Tensor, gain: Tensor) -> Tensor:
        y = F.rms_norm(x, gain.shape, gain, 1e-3)
        return y if rope is None else rotate(y, rope.double())

    ours = run(functools.partial(norm.rms_norm, eps=1e-3, rope=rope), dtype)
    oracle = run(exact, torch.float64)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert all(norm_off(o, e) < bound for o, e in zip(ours, oracle, strict=True))
    other = run(functools.partial(norm.rms_norm, eps=1.0, rope=rope), dtype)
    assert norm_off(other[0], oracle[0]) > 10 * bound  # negative control: eps is seen
    if rope is not None and shape[-1] > 6:
        wrong = run(functools.partial(norm.rms_norm, eps=1e-3, rope=rope.flip(0)), dtype)
        assert (
            norm_off(wrong[0], oracle[0]) > 0.1 and norm_off(wrong[1], oracle[1]) > 0.1
        )  # and so is which token a row is of


@pytest.mark.usefixtures("kernel")
def test_the_norm_gives_the_same_bits_every_time_and_steps_aside_when_watched() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 4, 32, requires_grad=True)
    module = RMSNorm(32)
    found = []
    for _ in range(3):
        y = module(x)
        found.append(torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.sin().sum(), (x, module.weight)))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])  # a resumed run's metrics rest on it
    assert y.grad_fn is not None and y.grad_fn.name() == "NativeRMSNormBackward"
    with FlopCounterMode(display=False):
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    with torch.no_grad():
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    assert norm.rms_norm(x.double(), module.weight, 1e-6) is None
