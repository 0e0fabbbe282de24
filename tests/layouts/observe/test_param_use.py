"""Which axis of a parameter is summed over, read from a forward pass, and what is no matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.layouts.observe.param_use import param_use

X = torch.randn(5, 6)
USES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": ((4, 6), lambda w: F.linear(X, w), (1,)),
    "transposed": ((6, 4), lambda w: X @ w, (0,)),
    "from the left": ((4, 6), lambda w: w @ X.T, (1,)),
    "square": ((6, 6), lambda w: X @ w, (0,)),
    "square, transposed": ((6, 6), lambda w: X @ w.T, (1,)),
    "made contiguous": ((6, 4), lambda w: F.linear(X, w.T.contiguous()), (0,)),
    "cast": ((4, 6), lambda w: F.linear(X.double(), w.double()), (1,)),
    "stacked experts": ((3, 6, 4), lambda w: torch.bmm(X.expand(3, 5, 6), w), (1,)),
    "stacked experts, one picked": ((3, 4, 6), lambda w: F.linear(X, w[1]), (2,)),
    "experts picked by a tensor": ((3, 6, 4), lambda w: torch.bmm(X[:, None], w[torch.tensor([0, 2, 1, 1, 0])]), (1,)),
    "einsum": ((3, 4, 6), lambda w: torch.einsum("ti,eoi->eto", X, w), (2,)),
    "experts along one axis": ((12, 6), lambda w: F.linear(X, w.view(3, 4, 6)[2]), (1,)),
    "experts along one axis, down": ((18, 4), lambda w: X @ w.view(3, 6, 4)[2], (0,)),
    "heads split": ((8, 6), lambda w: torch.einsum("ti,hoi->tho", X, w.view(2, 4, 6)), (1,)),
    "halves of a fused weight": ((8, 6), lambda w: F.linear(X, w[:4]) * F.linear(X, w[4:]), (1,)),
    "1 + gain, then a product": ((4, 6), lambda w: F.linear(X, 1 + w), (1,)),
}


class One(nn.Module):
    """A single weight and what is done with it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use


@pytest.mark.parametrize("name", USES)
def test_the_summed_axis_is_read_from_the_forward_pass(name: str) -> None:
    shape, use, summed = USES[name]
    model = One(shape, use)
    seen = param_use(model, lambda: use(model.w))["w"]
    assert seen.summed == {summed} and not seen.looked_up


# Where the input's six coordinates are the summed axis, one to one.
ONE_TO_ONE = [
    name for name, (shape, _, (axis,)) in USES.items() if shape[axis] == 6 and not name.startswith("1 + gain")
]


@pytest.mark.parametrize("name", ONE_TO_ONE)
def test_what_was_read_is_what_the_numbers_say(name: str) -> None:
    # Independently: scale indices of the axis in w and the input the other way; a summed axis cancels, no other does.
    assert len(ONE_TO_ONE) >= len(USES) - 3
    shape, use, (axis,) = USES[name]
    global X
    w, x = torch.randn(shape), X
    try:
        plain = use(w)
        scale = torch.rand(6) + 0.5
        X = x / scale
        cancelled = use(w * scale.view([6 if i == axis else 1 for i in range(w.dim())]))
        others = [
            use(w * torch.linspace(0.5, 1.5, n).view([n if i == other else 1 for i in range(w.dim())]))
            for other, n in enumerate(shape)
            if other != axis
        ]
    finally:
        X = x
    torch.testing.assert_close(cancelled, plain, rtol=1e-4, atol=1e-4)
    assert others and all((found - plain).abs().max() > 1e-2 for found in others)


def test_gains_biases_lookups_sinks_and_filters_are_not_matrices() -> None:
    model = nn.Module()
    model.gain, model.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(4))
    model.sink, model.rate = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.randn(6))
    model.weight, model.table = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(9, 6))
    model.filter, model.unused = nn.Parameter(torch.randn(6, 1, 3)), nn.Parameter(torch.randn(2, 2))

    def run() -> None:
        x = F.embedding(torch.arange(5), model.table) * (1 + model.gain) * -model.rate.exp()
        y = F.linear(x, model.weight, model.bias)
        torch.cat([y, model.sink[:, None]], -1).softmax(-1)
        F.conv1d(x.T[None], model.filter, groups=6)

    seen = param_use(model, run)
    assert seen["table"].looked_up and seen["filter"].convolved and seen["weight"].summed == {(1,)}
    for name in ("gain", "bias", "sink", "rate"):
        assert seen[name].elementwise and not seen[name].summed, name
    assert not seen["unused"].seen
