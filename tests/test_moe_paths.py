"""The lab's attention and normalisation paths against torch's own, in double precision and in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mue.lab import paths


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 6), (1, 1)])
def test_rms_norm_is_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape[-1], dtype=torch.float64)
    gain.requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64)
    found = []
    for function in (lambda: paths.rms_norm(x, gain, 1e-3), lambda: F.rms_norm(x, gain.shape, gain, 1e-3)):
        y = function()
        found.append([y, *torch.autograd.grad(y, (x, gain), dy)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, gain: paths.rms_norm(x, gain, 1e-3), (x, gain))
    assert not torch.allclose(paths.rms_norm(x, gain, 1.0), found[0][0])  # negative control: eps is seen


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_plain_attention_is_the_fused_one(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 both are as far from float64; the length decides which is taken."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 20, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    exact = paths.attend(q, k, v, 0.3)
    half = [x.bfloat16() for x in (q, k, v)]
    calls = []
    plain = paths._plain
    monkeypatch.setattr(paths, "_plain", lambda *arguments: calls.append(1) or plain(*arguments))
    errors = []
    for length in (256, 0):
        monkeypatch.setattr(paths, "_PLAIN_LENGTH", length)
        errors.append((paths.attend(*half, 0.3).double() - exact).norm() / exact.norm())
    assert calls == [1]
    assert errors[0] < 1.5 * errors[1] and errors[1] < 0.02
    assert (paths.attend(*half, 0.6).double() - exact).norm() / exact.norm() > 0.02  # negative control: scale is seen
