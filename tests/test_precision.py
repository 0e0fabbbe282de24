"""The tolerance that tests compare with: it allows another order of a sum, in every type, and no more than that."""

from __future__ import annotations

import pytest
import torch

from support.precision import close, off, rounding


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """A sum rounded after every term, which is the worst that an order can be."""
    total = torch.zeros(terms.shape[1:], dtype=terms.dtype)
    for term in terms:
        total = total + term
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [16, 256, 1000])
def test_another_order_of_a_sum_is_close(dtype: torch.dtype, terms: int) -> None:
    torch.manual_seed(terms)
    x = torch.randn(terms, 200, dtype=torch.float64).to(dtype)
    forwards, backwards = in_order(x), in_order(x.flip(0))
    assert off(forwards, backwards) > 0, "the order changed nothing: there was nothing to allow"
    assert close(forwards, backwards, operations=terms)
    assert off(forwards, backwards) > rounding(dtype, terms) / 1000  # and the bound is not a licence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_real_fault_is_not_close(dtype: torch.dtype) -> None:
    """A multiplier off by 1 %, and one entry of a weight off by 1 % of itself, seen in a product over 100."""
    torch.manual_seed(0)
    x, w = torch.randn(30, 100, dtype=dtype), torch.randn(100, 40, dtype=dtype)
    y = x @ w
    assert close(x @ w, y, operations=100)
    assert not close(1.01 * y, y, operations=100)
    w[3, 7] *= 1.01
    assert not close(x @ w, y, operations=100)


def test_what_is_not_comparable_is_refused() -> None:
    x = torch.ones(3)
    for other in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(AssertionError):
            close(other, x, operations=1)
    assert not close(torch.tensor([1.0, float("nan"), 1.0]), x, operations=100)
    assert not close(x, torch.zeros(3), operations=100) and close(x, x.clone(), operations=0)
