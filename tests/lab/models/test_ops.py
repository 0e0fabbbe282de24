"""The lab's products and attention in bf16 against torch's own, and when a block goes by the kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from mue.kernels import library
from mue.lab.models import ops as paths
from support.precision import norm_off


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
    assert norm_off(found, exact) < 1.5 * norm_off(torchs, exact) < 0.03
    assert norm_off(paths.attend(*half, 0.6), exact) > 0.02  # negative control: scale is seen
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
            assert norm_off(ours, torchs.double()) < 4e-3  # both round; a bit of bf16 is 4e-3
        assert (
            norm_off(found[0][0], (x.flatten(-3, -2) @ weight.mT).view_as(y).double()) > 5e-4
        )  # negative control: it rounds
        assert paths.project(x, weight).dtype == torch.float32  # and only where bf16 is asked for


@pytest.mark.usefixtures("kernel")
def test_when_a_block_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, in float32, or in bf16 that is emulated or by its own instructions, where it fits the cache and has work for every thread; of variants as of one."""
    x, weights = torch.randn(2, 8, 16), [torch.randn(16), torch.randn(16, 16)]
    small, large = torch.randn(1, 8, 16), torch.randn(2, 1 << 14, 16)
    monkeypatch.setattr(paths, "thread_count", lambda: 2)
    for x_BTD, attention, feed_forward in (
        (x, True, True), (small, False, True), (large, False, True), (x.double(), False, False), (x[None], False, False),
    ):  # fmt: skip
        assert paths.attention_by_kernel(x_BTD, weights) == attention
        assert paths.feed_forward_by_kernel(x_BTD, [*weights, None]) == feed_forward
    stacked = [torch.stack([weight] * 3) for weight in weights]
    assert paths.attention_by_kernel(small.expand(3, *small.shape), stacked)  # of one sequence each
    assert paths.feed_forward_by_kernel(x.expand(3, *x.shape), stacked)
    assert not paths.attention_by_kernel(x.expand(2, *x.shape), stacked)
    with torch.no_grad():
        assert not paths.attention_by_kernel(x, weights)
    with FlopCounterMode(display=False):
        assert not paths.feed_forward_by_kernel(x, weights)
    sharded = TwoTensor(weights[1], weights[1])
    assert not paths.attention_by_kernel(x, [weights[0], sharded])
    wide = torch.empty(1 << 10, 1 << 9)
    assert not paths.attention_by_kernel(x, [wide]) and not paths.feed_forward_by_kernel(x, [wide])
    with torch.autocast("cpu", torch.bfloat16):
        for instructions, engine, ours in (
            (False, "plain", True), (True, "plain", False), (True, "dot products", True), (True, "matrix unit", False),
        ):  # fmt: skip
            monkeypatch.setattr(paths, "bf16_instructions", lambda instructions=instructions: instructions)
            monkeypatch.setattr(library, "engine", lambda engine=engine: engine)
            assert paths.feed_forward_by_kernel(x, weights) == ours
    monkeypatch.setattr(library, "built", lambda: False)
    assert not paths.attention_by_kernel(x, weights)
