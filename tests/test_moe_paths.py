"""The lab's paths through attention, products, norms and feed-forward against torch's own, in double precision and in bf16."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mue.lab import paths
from mue.lab.model import RMSNorm, rotary_table, rotate
from mue.moe import native
from mue.moe.native import build, norm

needs_kernel = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def kernel() -> None:
    build.build()
    native.forget()


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_kernel
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "turned"), [((5, 7), False), ((2, 3, 4, 6), True), ((3, 40, 4, 32), True), ((1, 3), False)]
)
def test_the_kernels_norm_is_torchs(shape: tuple[int, ...], turned: bool, dtype: torch.dtype) -> None:
    """Output, gradients of input and gain, with and without RoPE; widths that fill no vector too."""
    torch.manual_seed(0)
    x, gain = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    turn = rotary_table(shape[1], shape[-1]) if turned else None
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
        return y if turn is None else rotate(y, turn.double())

    ours = run(functools.partial(norm.rms_norm, eps=1e-3, turn=turn), dtype)
    oracle = run(exact, torch.float64)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert all(off(o, e) < bound for o, e in zip(ours, oracle, strict=True))
    other = run(functools.partial(norm.rms_norm, eps=1.0, turn=turn), dtype)
    assert off(other[0], oracle[0]) > 10 * bound  # negative control: eps is seen
    if turn is not None and shape[-1] > 6:
        wrong = run(functools.partial(norm.rms_norm, eps=1e-3, turn=turn.flip(0)), dtype)
        assert off(wrong[0], oracle[0]) > 0.1 and off(wrong[1], oracle[1]) > 0.1  # and so is which token a row is of


@needs_kernel
@pytest.mark.usefixtures("kernel")
def test_the_norm_gives_the_same_bits_every_time_and_steps_aside_when_watched() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 4, 32, requires_grad=True)
    module = RMSNorm(32)
    found = []
    for _ in range(3):
        y = module(x)
        found.append(torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.sin().sum(), (x, module.weight)))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert y.grad_fn is not None and y.grad_fn.name() == "NativeRMSNormBackward"
    with FlopCounterMode(display=False):
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    with torch.no_grad():
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    assert norm.rms_norm(x.double(), module.weight, 1e-6) is None


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("instructions", [True, False])
def test_attention_in_bf16_is_as_near_as_torchs(
    kv_heads: int, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain products and in float32 it is no further from float64 than the fused kernel; machine and length decide."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 20, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    exact = paths.attend(q, k, v, 0.3)
    half = [x.bfloat16() for x in (q, k, v)]
    calls = []
    plain = paths._plain
    monkeypatch.setattr(paths, "_plain", lambda *arguments: calls.append(1) or plain(*arguments))
    monkeypatch.setattr(paths, "bf16_instructions", lambda: instructions)
    with torch.autocast("cpu", torch.bfloat16):
        found = paths.attend(*half, 0.3)
    torchs = F.scaled_dot_product_attention(*half, is_causal=True, scale=0.3, enable_gqa=True)
    assert found.dtype == torch.bfloat16 and calls == [1] * instructions
    assert off(found, exact) < 1.5 * off(torchs, exact) < 0.03
    assert off(paths.attend(*half, 0.6), exact) > 0.02  # negative control: scale is seen
    monkeypatch.setattr(paths, "_PLAIN_LENGTH", 19)
    calls.clear()
    paths.attend(*half, 0.3)
    assert not calls


def test_a_product_in_emulated_bf16_is_the_product_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs are rounded as bf16 is, gradients too; one weight or a variant each."""
    torch.manual_seed(2)
    for lead in ((), (3,)):
        x = torch.randn(*lead, 5, 6, 64, requires_grad=True)
        weight = torch.randn(*lead, 32, 64, requires_grad=True)
        dy = torch.randn(*lead, 5, 6, 32).bfloat16()
        found = []
        for instructions in (False, True):
            monkeypatch.setattr(paths, "bf16_instructions", lambda instructions=instructions: instructions)
            with torch.autocast("cpu", torch.bfloat16):
                y = paths.project(x, weight)
            assert y.dtype == torch.bfloat16
            found.append([y, *torch.autograd.grad(y, (x, weight), dy)])
        for ours, torchs in zip(*found, strict=True):
            assert ours.dtype == torchs.dtype
            assert off(ours, torchs.double()) < 4e-3  # both round; a bit of bf16 is 4e-3
        assert (
            off(found[0][0], (x.flatten(-3, -2) @ weight.mT).view_as(y).double()) > 5e-4
        )  # negative control: it rounds
        assert paths.project(x, weight).dtype == torch.float32  # and only where bf16 is asked for


@needs_kernel
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("gated", [True, False])
def test_a_dense_ffn_by_the_kernel_is_the_dense_ffn(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 9, 32, requires_grad=True)
    matrices = [(torch.randn(s) / s[-1] ** 0.5).requires_grad_() for s in ((48, 32), (48, 32), (32, 48))]
    leaves = [x, *matrices] if gated else [x, *matrices[1:]]
    found = []
    for largest in (paths._KERNEL_MATRIX, 0):
        monkeypatch.setattr(paths, "_KERNEL_MATRIX", largest)
        y = paths.feed_forward(x, matrices[0] if gated else None, *matrices[1:])
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert ("experts_native" in y.grad_fn.next_functions[0][0].name()) == (largest > 0)
    for ours, torchs in zip(*found, strict=True):
        assert off(ours, torchs.double()) < 1e-6
    swapped = paths.feed_forward(x, matrices[1], matrices[0], matrices[2])
    assert not torch.allclose(swapped, found[0][0], rtol=0.1)  # negative control: which is the gate is seen


def test_the_lab_starts_without_the_compiler() -> None:
    """It takes as long to import as all of torch."""
    command = "import sys, mue.lab.worker, mue.lab.model; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False"]
