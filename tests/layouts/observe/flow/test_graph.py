"""A recorded pass: what was written in place, views of it, and what is no value of anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mue.layouts.observe.flow.follow import flow_of
from mue.layouts.observe.flow.graph import record_graph


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))


def origins(run: object, x: Tensor) -> set[frozenset[str]]:
    """The matrices that what ``run`` returns was made of."""
    model = One()
    nodes, ends = record_graph(model, lambda: run(model, x), [x])  # type: ignore[operator]
    flow = flow_of(nodes, ends)
    return {flow.products[node].parameters for end in ends for node, _ in flow.origins[end]}


X = torch.randn(4, 6)
W, V = frozenset({"w"}), frozenset({"v"})


def test_what_is_written_into_a_slice_is_in_the_whole() -> None:
    def run(model: One, x: Tensor) -> Tensor:
        y = torch.zeros(4, 6)
        y[1:3] += (x @ model.w)[1:3]
        return y

    assert origins(run, X) == {W}


def test_a_view_sees_what_is_written_later() -> None:
    def run(model: One, x: Tensor) -> Tensor:
        y = torch.zeros(4, 6)
        view = y[:2]
        y.add_(x @ model.w)
        return view

    assert origins(run, X) == {W}


def test_a_value_before_it_was_overwritten_is_not_what_came_after() -> None:
    def run(model: One, x: Tensor) -> Tensor:
        y = x @ model.w
        z = y * 2
        y.add_(x @ model.v)
        return z

    assert origins(run, X) == {W}


def test_the_size_of_a_tensor_is_none_of_its_values() -> None:
    def run(model: One, x: Tensor) -> Tensor:
        return torch.ones_like(x @ model.w) + x @ model.v

    assert origins(run, X) == {V}
