"""The portable backend: pure torch, a hand-written forward and backward. Why it is laid out as it is:

* rows lie in expert order, so that every product works on a contiguous slice and writes its result (also the weight
  gradients) in place, with out=; indexing w[i] under autograd would write a full-size zero gradient per expert;
* every product is a batch that has whole products for every thread: experts of nearly equal load together, or one expert
  cut into parts. Threads that share a small product wait for each other, and every call costs tens of microseconds;
* elementwise work runs over chunks of several such batches, small enough for the cache, large enough for all threads;
* the combine is one fused gather-and-sum (embedding_bag), which needs no atomics and so gives the same bits every time, and
  applies the routing weights; their gradient is its own, and every other one gets them with the gathered rows of dy;
* where the rows are so large that their memory is fresh every time, those of dx are added chunk by chunk;
* weights of another type are cast batch by batch, in memory that is kept between calls: copies of all of them would be
  new pages in each step, and would be kept for the backward;
* gate x, up x and each row's output are saved for the backward; gathered inputs and hidden rows are made again.

Shape suffixes: T tokens, K slots per token, P pairs, N experts, D width, H expert width, M rows in expert order (the pairs
that are not padding, and the alignment rows that make experts equally long), B a batch, X either width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.backends.operator import Differentiable, Kernel, RoutedCall, operator
from mue.moe.backends.portable_rows import MOST_WASTE, Chunk, Order, order_of, strided
from mue.moe.routing import Routing

# oneDNN builds a primitive for every new shape, about 1 ms each in bf16; float32 goes to MKL, which does not.
_ROW_ALIGNMENT = {torch.bfloat16: 32, torch.float16: 32}
_MOST_PARTS = 16  # of one expert
_MOST_KEPT = 1 << 26  # bytes of one buffer that are kept for a call that needs fewer
_LARGE = 1 << 25  # bytes of all rows: glibc gives 32 MiB and more back after every use (docs/LOG.md)


def _combine(row_MD: Tensor, order: Order, tokens: int, weight_P: Tensor | None = None) -> Tensor:
    """(T, D): the (weighted) sum of each token's rows, in a fixed order. The last row of row_MD is the zero row."""
    if order.bag.numel() == 0:
        return row_MD.new_zeros(tokens, row_MD.shape[1])
    weight = None if weight_P is None else weight_P.to(row_MD.dtype)
    if weight is not None:
        weight = weight.view_as(order.bag) if order.bag_P is None else weight[order.bag_P]
    return F.embedding_bag(order.bag, row_MD, order.offset_T, mode="sum", per_sample_weights=weight)


class _Scratch:
    """Buffers that chunks and, on the CPU, later calls reuse: fresh memory costs page faults."""

    kept = threading.local()

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffers = like, {}
        # other kinds of tensors (of a FakeTensorMode, of inference mode) are of no use to later calls
        if type(like) is Tensor and like.device.type == "cpu" and not torch.is_inference_mode_enabled():
            self.buffers = self.kept.__dict__

    def __call__(self, name: str, rows: int, *shape: int) -> Tensor:
        """(rows, *shape) of the type of `like`."""
        key, count = f"{name} {self.like.dtype}", rows * math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count or buffer.numel() * buffer.element_size() > _MOST_KEPT:
            buffer = self.buffers[key] = self.like.new_empty(count)
        return buffer[:count].view(rows, *shape)


def _plan(inputs: Differentiable, call: RoutedCall) -> Order:
    x_TD, up_NHD = inputs.x_TD, inputs.up
    assert up_NHD is not None
    routing = Routing(call.token_P, call.expert_P, inputs.weight_P.detach(), x_TD.shape[0], call.number, call.slots)
    alignment, parts = _ROW_ALIGNMENT.get(call.dtype), 1
    if alignment is None:
        alignment = parts = min(call.threads, _MOST_PARTS)
    return order_of(routing, x_TD.shape[1], up_NHD.shape[1], alignment, parts, call.dtype)


def _rows(call: RoutedCall) -> int:
    """Pairs, and the most that alignment can add."""
    pairs = call.token_P.shape[0]
    alone = (_ROW_ALIGNMENT.get(call.dtype, _MOST_PARTS) - 1) * min(pairs, call.number)
    joined = pairs // (MOST_WASTE - 1)
    return pairs + (alone + joined if call.dtype in _ROW_ALIGNMENT else max(alone, joined))


def _forward(inputs: Differentiable, call: RoutedCall, saved: list[Tensor] | None) -> tuple[Tensor, Order]:
    """(T, D), see `experts`."""
    x_TD, _, gate_NHD, up_NHD, down_NDH = inputs[:5]
    assert up_NHD is not None and down_NDH is not None
    order = _plan(inputs, call)
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    if saved is None:
        gate_MH, up_MH = x_TD.new_empty(0 if gate_NHD is None else (total, inner)), x_TD.new_empty(total, inner)
        y_MD = x_TD.new_empty(total + 1, width)
    else:
        gate_MH, up_MH, y_MD = saved[:3]
    # the row that padding pairs are sent to (Order.row_P)
    y_MD[total].zero_()
    scratch = _Scratch(x_TD)
    for chunk in order.chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("x", size, width))
        hidden, up = scratch("hidden", size, inner), up_MH[span]
        _products(x, up_NHD, chunk, up, scratch, turned=True)
        if gate_NHD is not None:
            gate = gate_MH[span]
            _products(x, gate_NHD, chunk, gate, scratch, turned=True)
            # out= forms, which autograd does not know and this forward does not need: no fresh memory for a chunk
            torch.ops.aten.silu.out(gate, out=hidden)
            hidden.mul_(up)
        else:
            torch.ops.aten.gelu.out(up, out=hidden)
        _products(hidden, down_NDH, chunk, y_MD[span], scratch, turned=True)
    return _combine(y_MD, order, x_TD.shape[0], inputs.weight_P), order


def _backward(
    dy_TD: Tensor,
    inputs: Differentiable,
    call: RoutedCall,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    order: Order | None,
) -> list[Tensor | None]:
    """Gradients of the inputs."""
    x_TD, weight_P, gate_NHD, up_NHD, down_NDH = inputs[:5]
    assert up_NHD is not None and down_NDH is not None
    need_x, need_weight, need_gate, need_up, need_down = needs[:5]
    # under torch.compile the forward cannot hand it on: sorted again, for the same number of threads
    order = _plan(inputs, call) if order is None else order
    gate_MH, up_MH, y_MD = saved[:3]
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    # rows of 16 bits are summed in float32, which only the bag does
    large = total * width * x_TD.element_size() > _LARGE and x_TD.dtype not in _ROW_ALIGNMENT
    dx_TD = torch.zeros_like(x_TD) if need_x and large else None
    scratch = _Scratch(x_TD)
    dx_MD = scratch("dx of all", total + 1, width) if need_x and not large else None
    dgate_NHD, dup_NHD, ddown_NDH = (
        _empty_gradient(weight, order.empty) if need else None
        for weight, need in ((gate_NHD, need_gate), (up_NHD, need_up), (down_NDH, need_down))
    )
    for chunk in order.chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        dy = torch.index_select(dy_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        dy.mul_(order.weight_M[span])
        dhidden, up = scratch("dhidden", size, inner), up_MH[span]
        _products(dy, down_NDH, chunk, dhidden, scratch)
        act, dup = scratch("act", size, inner), scratch("dup", size, inner)
        gate = None if gate_NHD is None else gate_MH[span]
        dgate = _activation_gradients(dhidden, gate, up, act, dup)
        if ddown_NDH is not None:
            _outer_products(dy, act, chunk, ddown_NDH, scratch)
        # dy has done its work: its buffer takes the tokens
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        if dup_NHD is not None:
            _outer_products(dup, x, chunk, dup_NHD, scratch)
        if dgate_NHD is not None and dgate is not None:
            _outer_products(dgate, x, chunk, dgate_NHD, scratch)
        if need_x:
            dx = scratch("dx", size, width) if dx_MD is None else dx_MD[span]
            _products(dup, up_NHD, chunk, dx, scratch)
            if gate_NHD is not None and dgate is not None:
                _products(dgate, gate_NHD, chunk, dx, scratch, add=True)
            if dx_TD is not None:
                dx_TD.index_add_(0, order.token_M[span], dx)
    dweight_P = None
    if dx_MD is not None:
        dx_MD[total].zero_()
        dx_TD = _combine(dx_MD, order, x_TD.shape[0])
    if need_weight:
        # The gradient of embedding_bag's own weights: each pair's row of y times its token's row of dy.
        row_P, token_P = order.row_P, call.token_P
        dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
        dweight_P = dot(dy_TD, y_MD, row_P, row_P, token_P, 0).to(weight_P.dtype)
    return [dx_TD, dweight_P, dgate_NHD, dup_NHD, ddown_NDH, None, None, None]


def _activation_gradients(dhidden: Tensor, gate: Tensor | None, up: Tensor, act: Tensor, dup: Tensor) -> Tensor | None:
    """Of hidden = silu(gate) · up, or gelu(up): fills ``act`` with hidden and ``dup``; dgate takes the place of ``dhidden``."""
    if gate is None:
        torch.ops.aten.gelu.out(up, out=act)
        torch.ops.aten.gelu_backward.grad_input(dhidden, up, grad_input=dup)
        return None
    torch.ops.aten.silu.out(gate, out=act)
    torch.mul(dhidden, act, out=dup)
    act.mul_(up)
    # in place, in the order in which each of the three is needed no more
    dgate = dhidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate


def _empty_gradient(weight: Tensor | None, empty: list[int]) -> Tensor | None:
    """A gradient to be filled expert by expert; exact zeros for the experts without rows."""
    if weight is None:
        return None
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert in empty:
        gradient[expert].zero_()
    return gradient


def _products(
    left_MX: Tensor, weights: Tensor, chunk: Chunk, out_MX: Tensor, scratch: _Scratch, *, turned: bool = False, add: bool = False
) -> None:  # fmt: skip
    """out[rows of e] (+)= left[rows of e] @ weights[e] (or its transpose, turned), for the experts of the chunk."""
    for batch in chunk.batches:
        left, into = batch.of(left_MX), batch.of(out_MX)
        if weights.dtype == left.dtype:
            right = batch.matrices(weights.mT if turned else weights)
        else:
            own = scratch("weights", batch.experts, *weights.shape[1:])
            own.copy_(weights[batch.first : batch.first + batch.experts])
            right = batch.matrices(own.mT if turned else own, first=0)
        if add:
            into.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=into)


def _outer_products(left_MX: Tensor, right_MX: Tensor, chunk: Chunk, out_NXX: Tensor, scratch: _Scratch) -> None:
    """out[e] = left[rows of e]^T @ right[rows of e], for the experts of the chunk."""
    tall, wide = out_NXX.shape[1:]
    for batch in chunk.batches:
        first, experts, parts, rows, start = batch
        whole = out_NXX[first : first + experts]
        made = whole if out_NXX.dtype == left_MX.dtype else scratch("gradients", experts, tall, wide)
        if parts == 1:
            torch.bmm(batch.of(left_MX).mT, batch.of(right_MX), out=made)
        else:
            # Each part makes some rows of the result from all rows: a sum over parts would be made by all threads.
            count, parts = rows * parts, parts if tall % parts == 0 else 1
            left = strided(left_MX, (parts, tall // parts, count), (tall // parts, 1, tall), start * tall)
            right = strided(right_MX, (parts, count, wide), (0, wide, 1), start * wide)
            torch.bmm(left, right, out=strided(made, (parts, tall // parts, wide), (tall // parts * wide, wide, 1), 0))
        if made is not whole:
            whole.copy_(made)


run = operator("experts_portable", Kernel(_forward, _backward, _rows, outputs=True))
