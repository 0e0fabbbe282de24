# ruff: noqa: N815 (shape suffixes in field names)
"""A hand-written forward and backward as something that autograd and torch.compile can use.

Eagerly an autograd.Function calls the kernel; under torch.compile the same kernel is a custom operator whose results'
shapes follow from its arguments', so that there is no graph break. (Both, because an operator costs 0.2 ms more a step.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mue.kernels.operator import thread_count
from mue.moe.expert_weights import ExpertWeights
from mue.moe.routing import Routing

_WEIGHTS = (torch.float32, torch.float64)


class RoutedCall(NamedTuple):
    """What gets no gradient: where the pairs go, and how rows are computed.

    Attributes:
        token_P, expert_P: of each pair, contiguous. number: N.
        slots: see :class:`mue.moe.routing.Routing`.
        dtype: in which rows are computed.
        threads: noted with the forward, since a layout made for them has to be the backward's as well.
    """

    token_P: Tensor
    expert_P: Tensor
    number: int
    slots: int
    dtype: torch.dtype
    threads: int


class Differentiable(NamedTuple):
    """What gets gradients, contiguous: the tokens (T, D), the weights (P,) in float32 or float64, and the matrices in the
    order and the shapes of :class:`mue.moe.expert_weights.ExpertWeights`."""

    x_TD: Tensor
    weight_P: Tensor
    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None
    shared_gate: Tensor | None
    shared_up: Tensor | None
    shared_down: Tensor | None


class Kernel(NamedTuple):
    """A backend's own work.

    forward(inputs, call, saved) -> y_TD and anything the backward would otherwise compute again. `saved` holds four
        buffers to fill for the backward: gate x and up x of the routed rows, then of the shared; empty where there is no
        such matrix; None where nobody will ask for gradients.
    backward(dy_TD, inputs, call, saved, needs, extra) -> a gradient for each input that needs one, else None. `extra`
        is what forward returned, or None.
    rows(call) -> how many routed rows `saved` has: at least the pairs.
    outputs: for a kernel without shared experts; the third buffer then holds each routed row's output, and one row more.
    """

    forward: Callable[[Differentiable, RoutedCall, list[Tensor] | None], tuple[Tensor, Any]]
    backward: Callable[[Tensor, Differentiable, RoutedCall, Sequence[Tensor], Sequence[bool], Any], list[Tensor | None]]
    rows: Callable[[RoutedCall], int]
    outputs: bool = False


Run = Callable[[Tensor, Routing, ExpertWeights, torch.dtype], Tensor]


def operator(name: str, kernel: Kernel) -> Run:
    """The differentiable function made of a kernel, also registered as `torch.ops.mue.{name}`."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: RoutedCall, keep: bool, *tensors: Any) -> Tensor:
            inputs = Differentiable(*tensors)
            saved = _saved(inputs, call, kernel) if keep else None
            y_TD, ctx.extra = kernel.forward(inputs, call, saved)
            if saved is not None:
                # tensors go through save_for_backward, which watches for changes in place; the rest is kept as it is
                ctx.call = call[2:]
                ctx.save_for_backward(*inputs, *call[:2], *saved)
            return y_TD

        @staticmethod
        # The backward is hand-written and has none of its own: a second derivative is refused, instead of being zero.
        @once_differentiable
        def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
            inputs, pairs, saved = _split(ctx.saved_tensors)
            needs = ctx.needs_input_grad[2:]
            call = RoutedCall(*pairs, *ctx.call)
            return None, None, *kernel.backward(dy_TD.contiguous(), inputs, call, saved, needs, ctx.extra)

    named: Any = type(name, (Eager,), {})  # what a profile shows
    compiled = _register(name, kernel)

    def run(x_TD: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
        weight_P = routing.weight_P if routing.weight_P.dtype in _WEIGHTS else routing.weight_P.float()
        inputs = Differentiable(x_TD.contiguous(), weight_P.contiguous(), *weights.map(Tensor.contiguous).matrices)
        token_P, expert_P = routing.token_P.contiguous(), routing.expert_P.contiguous()
        call = RoutedCall(token_P, expert_P, routing.num_experts, routing.slots, dtype, thread_count())
        if torch.compiler.is_compiling():
            y_TD: Tensor = compiled(*inputs, *call)[0]
        else:
            # validation keeps no rows: they are most of a layer's memory
            keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
            y_TD = named.apply(call, keep, *inputs)
        return y_TD

    return run


def _saved(inputs: Differentiable, call: RoutedCall, kernel: Kernel) -> list[Tensor]:
    """Memory for what the backward would otherwise compute again.

    Its shapes follow from the arguments' shapes alone, whatever the routing is: torch.compile has to know them.
    """
    x_TD, rows = inputs.x_TD, kernel.rows(call)
    saved = [
        x_TD.new_empty(0 if matrix is None else (count, matrix.shape[-2]), dtype=call.dtype)
        for matrix, count in (
            (inputs.gate, rows),
            (inputs.up, rows),
            (inputs.shared_gate, x_TD.shape[0]),
            (inputs.shared_up, x_TD.shape[0]),
        )
    ]
    if kernel.outputs:
        saved[2] = x_TD.new_empty(rows + 1, x_TD.shape[1], dtype=call.dtype)
    return saved


def _split(tensors: Sequence[Any]) -> tuple[Differentiable, tuple[Tensor, Tensor], Sequence[Tensor]]:
    """Differentiable, (token_P, expert_P), saved: the order in which both forms save for the backward."""
    return Differentiable(*tensors[:8]), (tensors[8], tensors[9]), tensors[10:]


def _register(name: str, kernel: Kernel) -> Callable[..., tuple[Tensor, ...]]:
    """`torch.ops.mue.{name}(*inputs, *call)` -> y_TD and the four saved buffers."""

    @torch.library.custom_op(f"mue::{name}", mutates_args=())
    def forward(
        x_TD: Tensor, weight_P: Tensor, gate: Tensor | None, up: Tensor | None, down: Tensor | None,
        shared_gate: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None,
        token_P: Tensor, expert_P: Tensor, number: int, slots: int, dtype: torch.dtype, threads: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        inputs = Differentiable(x_TD, weight_P, gate, up, down, shared_gate, shared_up, shared_down)
        call = RoutedCall(token_P, expert_P, number, slots, dtype, threads)
        saved = _saved(inputs, call, kernel)
        return kernel.forward(inputs, call, saved)[0], saved[0], saved[1], saved[2], saved[3]

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, call = Differentiable(*arguments[:8]), RoutedCall(*arguments[8:])
        y_TD = inputs.x_TD.new_empty(inputs.x_TD.shape, dtype=call.dtype)
        return y_TD, *_saved(inputs, call, kernel)

    @torch.library.custom_op(f"mue::{name}_backward", mutates_args=())
    def backward(
        dy_TD: Tensor, x_TD: Tensor, weight_P: Tensor, gate: Tensor | None, up: Tensor | None, down: Tensor | None,
        shared_gate: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None,
        token_P: Tensor, expert_P: Tensor, saved: list[Tensor], number: int, slots: int, dtype: torch.dtype,
        threads: int, needs: list[bool],
    ) -> list[Tensor]:  # fmt: skip
        inputs = Differentiable(x_TD, weight_P, gate, up, down, shared_gate, shared_up, shared_down)
        call = RoutedCall(token_P, expert_P, number, slots, dtype, threads)
        gradients = kernel.backward(dy_TD.contiguous(), inputs, call, saved, needs, None)
        # an operator's results are tensors: an empty one stands for none, and is dropped by ``differentiate``
        return [dy_TD.new_empty(0) if gradient is None else gradient for gradient in gradients]

    @backward.register_fake
    def _(dy_TD: Tensor, *arguments: Any) -> list[Tensor]:
        inputs, needs = arguments[:8], arguments[-1]
        return [torch.empty_like(x) if need else dy_TD.new_empty(0) for x, need in zip(inputs, needs, strict=True)]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # or autograd would make zeros as large as the saved rows, for outputs that nobody differentiates
        ctx.set_materialize_grads(False)
        ctx.call = inputs[10:]
        ctx.save_for_backward(*inputs[:10], *output[1:])

    def differentiate(ctx: Any, dy_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:8])
        if dy_TD is None:
            return (None,) * 14
        inputs, pairs, saved = _split(ctx.saved_tensors)
        found = backward(dy_TD, *inputs, *pairs, list(saved), *ctx.call, needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *([None] * 6)

    forward.register_autograd(differentiate, setup_context=keep)
    return forward
