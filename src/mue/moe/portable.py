# ruff: noqa: N815 (shape suffixes in field names)
"""The portable backend: pure torch, a hand-written forward and backward. Why it is laid out as it is:

* rows lie in expert order, so that every product works on a contiguous slice and writes its result (also the weight
  gradients) in place, with out=; indexing w[i] under autograd would write a full-size zero gradient per expert;
* every product is a batch that has whole products for every thread: experts of nearly equal load together, or one expert
  cut into parts. Threads that share a small product wait for each other, and every call costs tens of microseconds;
* elementwise work runs over chunks of several such batches, small enough for the cache, large enough for all threads;
* the combine is one fused gather-and-sum (embedding_bag), which needs no atomics and so gives the same bits every time, and
  applies the routing weights; their gradient is its own, and every other one gets them with the gathered rows of dy;
* where the rows are so large that their memory is fresh every time, those of dx are added chunk by chunk;
* gate x, up x and each row's output are saved for the backward; gathered inputs and hidden rows are made again.

Shape suffixes: T tokens, K slots per token, P pairs, N experts, D width, H expert width, M rows in expert order (the pairs
that are not padding, and the alignment rows that make experts equally long), B a batch, X either width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.operator import Inputs, Kernel, Problem, operator
from mue.moe.routing import Routing, expert_load

# oneDNN builds a primitive for every new shape, about 1 ms each in bf16; float32 goes to MKL, which does not.
_ROW_ALIGNMENT = {torch.bfloat16: 32, torch.float16: 32}
# Below, what was measured with benchmarks/moe_layer.py on 2 cores.
_CHUNK_ELEMENTS = 1 << 18  # of one chunk's (rows, H) buffer
_BATCH_COST = 9 << 23  # multiply-adds of one batch of experts; larger ones gain nothing
_JOINING = 1 << 21  # multiply-adds in alignment rows that one call less is worth
_MOST_WASTE = 8  # of so many rows of a batch one may be alignment
_MOST_PARTS = 16  # of one expert
_LARGE = 1 << 25  # bytes of all rows, above which malloc gives memory back after every use
_RADIX = 1 << 15  # torch sorts so many integers, or more, in linear time


class _Batch(NamedTuple):
    """Consecutive experts with equally many rows, or one expert, cut into parts with equally many.

    start is counted from the chunk's first row.
    """

    first: int
    experts: int
    parts: int
    rows: int  # of each expert or part
    start: int

    def of(self, x_MX: Tensor) -> Tensor:
        """(B, rows, X): the batch's rows of a chunk."""
        width, number = x_MX.shape[1], self.experts * self.parts
        return _strided(x_MX, (number, self.rows, width), (self.rows * width, width, 1), self.start * width)

    def matrices(self, w_NXX: Tensor) -> Tensor:
        """(B, out, in): each expert's or part's own."""
        apart, *strides = w_NXX.stride()
        shape = (self.experts * self.parts, *w_NXX.shape[1:])
        return _strided(w_NXX, shape, (apart if self.parts == 1 else 0, *strides), self.first * apart)


def _strided(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """A view in one call; slicing, viewing and expanding cost a few microseconds each."""
    return x.as_strided(shape, strides, x.storage_offset() + offset)


@dataclass
class _Chunk:
    """Consecutive batches whose elementwise work is done at once."""

    batches: list[_Batch]
    start: int
    stop: int


@dataclass
class _Order:
    """Rows in expert order.

    Attributes:
        chunks: all rows.
        empty: the experts without rows.
        token_M: (M,) the token of each row; an alignment row repeats its expert's last token.
        weight_M: (M, 1) the weight of each row, 0 for alignment rows, in the rows' dtype.
        row_P: (P,) the row of each pair; M (a row of zeros) for padding pairs.
        bag: the pairs' rows by token, as `embedding_bag` wants them: (T, K), or flat with offsets.
        bag_P: (P,) the pairs in the order of the flat form.
        offset_T: (T,) where each token's bag begins, None for the (T, K) form.
    """

    chunks: list[_Chunk]
    empty: list[int]
    token_M: Tensor
    weight_M: Tensor
    row_P: Tensor
    bag: Tensor
    bag_P: Tensor | None
    offset_T: Tensor | None


@torch.no_grad()
def _order(routing: Routing, width: int, inner: int, alignment: int, parts: int, dtype: torch.dtype) -> _Order:
    """Sorts the pairs by expert."""
    if routing.slots and not _is_token_major(routing):
        raise ValueError(f"slots={routing.slots} promises token_P = 0,0,..,1,1,..: give slots=0 for any other order")
    counts = expert_load(routing).tolist()
    pairs, real = routing.num_pairs, routing.num_pairs - counts.pop()
    chunks, rows = _layout(counts, alignment, parts, width * inner, _CHUNK_ELEMENTS // inner)
    total = sum(rows)
    pair_P = _argsort(routing.expert_P, routing.num_experts)
    arange = torch.arange(max(pairs, total), device=pair_P.device)
    if total == real:
        pair_M, row_M = pair_P[:real], arange[:real]
        weight_M = routing.weight_P.index_select(0, pair_M)
    else:
        table, start, end = [], 0, 0
        for count, row in zip(counts, rows, strict=True):
            table.append((count, row, start - end, end + count - 1))
            start, end = start + row, end + count
        load_N, rows_N, shift_N, last_N = torch.tensor(table, device=pair_P.device).unbind(1)
        place_M = arange[:total] - shift_N.repeat_interleave(rows_N, output_size=total)
        last_M = last_N.repeat_interleave(rows_N, output_size=total)
        pair_M = pair_P.index_select(0, torch.minimum(place_M, last_M))
        weight_M = routing.weight_P.index_select(0, pair_M) * (place_M <= last_M)
        row_M = arange[:real] + shift_N.repeat_interleave(load_N, output_size=real)
    row_P = torch.full_like(pair_P, total).scatter_(0, pair_P[:real], row_M)
    bag, bag_P, offset_T = row_P, None, None
    if routing.slots:
        bag = row_P.view(routing.num_tokens, routing.slots)
    else:
        bag_P = torch.argsort(routing.token_P, stable=True)
        bag = row_P[bag_P]
        pairs_T = torch.bincount(routing.token_P, minlength=routing.num_tokens)
        offset_T = pairs_T.cumsum(0) - pairs_T
    token_M = routing.token_P.index_select(0, pair_M)
    empty = [expert for expert, row in enumerate(rows) if row == 0]
    return _Order(chunks, empty, token_M, weight_M.to(dtype).unsqueeze(1), row_P, bag, bag_P, offset_T)


def _argsort(expert_P: Tensor, number: int) -> Tensor:
    """(P,) the pairs by expert; stable, so that rows of one expert stay in token order."""
    pairs = expert_P.shape[0]
    if not expert_P.is_cpu or number >= 1 << 15 or pairs < _RADIX // 8:
        return expert_P.argsort(stable=True)
    padded = expert_P.new_full((max(pairs, _RADIX),), number, dtype=torch.uint8 if number < 256 else torch.int16)
    padded[:pairs] = expert_P
    return padded.argsort(stable=True)[:pairs]


def _layout(counts: list[int], alignment: int, parts: int, cost: int, most: int) -> tuple[list[_Chunk], list[int]]:
    """Chunks of `most` rows, if no batch alone has more, and the rows of each expert.

    Experts go into one batch where the alignment rows cost less than the calls that are saved; `cost` is a row's.
    """
    chunks: list[_Chunk] = []
    rows: list[int] = []
    first = start = 0
    while first < len(counts):
        size, cut, row = 1, parts, -(-counts[first] // alignment) * alignment
        for several in (4 * parts, 2 * parts, parts) if parts > 1 else ():
            some = counts[first : first + several]
            padded = several * max(some)
            waste = min(padded // _MOST_WASTE, (several - 1) * _JOINING // cost)
            if len(some) == several and min(some) and padded <= _BATCH_COST // cost and padded - sum(some) <= waste:
                size, cut, row = several, 1, max(some)
                break
        stop = start + size * row
        if row:
            if not chunks or stop - chunks[-1].start > most:
                chunks.append(_Chunk([], start, start))
            chunks[-1].batches.append(_Batch(first, size, cut, row // cut, start - chunks[-1].start))
            chunks[-1].stop = stop
        rows += [row] * size
        first, start = first + size, stop
    return chunks, rows


def _combine(row_MD: Tensor, order: _Order, tokens: int, weight_P: Tensor | None = None) -> Tensor:
    """(T, D): the (weighted) sum of each token's rows, in a fixed order. The last row of row_MD is the zero row."""
    if order.bag.numel() == 0:
        return row_MD.new_zeros(tokens, row_MD.shape[1])
    weight = None if weight_P is None else weight_P.to(row_MD.dtype)
    if weight is not None:
        weight = weight.view_as(order.bag) if order.bag_P is None else weight[order.bag_P]
    return F.embedding_bag(order.bag, row_MD, order.offset_T, mode="sum", per_sample_weights=weight)


def _longest(order: _Order) -> int:
    return max((chunk.stop - chunk.start for chunk in order.chunks), default=0)


class _Scratch:
    """Buffers that chunks reuse: fresh memory costs page faults."""

    def __init__(self, like: Tensor, order: _Order) -> None:
        self.like, self.longest = like, _longest(order)
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.longest, width)
        return self.buffers[name][:rows]


def _is_token_major(routing: Routing) -> bool:
    token_T = torch.arange(routing.num_tokens, device=routing.token_P.device)
    return torch.equal(
        routing.token_P.view(routing.num_tokens, routing.slots), token_T[:, None].expand(-1, routing.slots)
    )


def _plan(inputs: Inputs, problem: Problem) -> _Order:
    x_TD, up_NHD = inputs.x_TD, inputs.up
    assert up_NHD is not None
    routing = Routing(
        problem.token_P, problem.expert_P, inputs.weight_P.detach(), x_TD.shape[0], problem.number, problem.slots
    )
    alignment, parts = _ROW_ALIGNMENT.get(problem.dtype), 1
    if alignment is None:
        alignment = parts = min(problem.threads, _MOST_PARTS)
    return _order(routing, x_TD.shape[1], up_NHD.shape[1], alignment, parts, problem.dtype)


def _rows(problem: Problem) -> int:
    """Pairs, and the most that alignment can add."""
    pairs = problem.token_P.shape[0]
    alone = (_ROW_ALIGNMENT.get(problem.dtype, _MOST_PARTS) - 1) * min(pairs, problem.number)
    return pairs + max(alone, pairs // (_MOST_WASTE - 1))


def _forward(inputs: Inputs, problem: Problem, saved: list[Tensor] | None) -> tuple[Tensor, _Order]:
    """(T, D), see `experts`."""
    x_TD, _, gate_NHD, up_NHD, down_NDH = inputs[:5]
    assert up_NHD is not None and down_NDH is not None
    order = _plan(inputs, problem)
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    if saved is None:
        gate_MH, up_MH = x_TD.new_empty(0 if gate_NHD is None else (total, inner)), x_TD.new_empty(total, inner)
        y_MD = x_TD.new_empty(total + 1, width)
    else:
        gate_MH, up_MH, y_MD = saved[:3]
    y_MD[total].zero_()
    scratch = _Scratch(x_TD, order)
    for chunk in order.chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("x", size, width))
        hidden, up = scratch("hidden", size, inner), up_MH[span]
        _products(x, up_NHD.mT, chunk, up)
        if gate_NHD is not None:
            gate = gate_MH[span]
            _products(x, gate_NHD.mT, chunk, gate)
            torch.ops.aten.silu.out(gate, out=hidden)
            hidden.mul_(up)
        else:
            torch.ops.aten.gelu.out(up, out=hidden)
        _products(hidden, down_NDH.mT, chunk, y_MD[span])
    return _combine(y_MD, order, x_TD.shape[0], inputs.weight_P), order


def _backward(
    dy_TD: Tensor,
    inputs: Inputs,
    problem: Problem,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    order: _Order | None,
) -> list[Tensor | None]:
    """Gradients of the inputs."""
    x_TD, weight_P, gate_NHD, up_NHD, down_NDH = inputs[:5]
    assert up_NHD is not None and down_NDH is not None
    need_x, need_weight, need_gate, need_up, need_down = needs[:5]
    order = _plan(inputs, problem) if order is None else order
    gate_MH, up_MH, y_MD = saved[:3]
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    # rows of 16 bits are summed in float32, which only the bag does
    large = total * width * x_TD.element_size() > _LARGE and x_TD.dtype not in _ROW_ALIGNMENT
    dx_TD = torch.zeros_like(x_TD) if need_x and large else None
    dx_MD = x_TD.new_empty(total + 1, width) if need_x and not large else None
    dgate_NHD, dup_NHD, ddown_NDH = (
        _empty_gradient(weight, order.empty) if need else None
        for weight, need in ((gate_NHD, need_gate), (up_NHD, need_up), (down_NDH, need_down))
    )
    scratch = _Scratch(x_TD, order)
    for chunk in order.chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        dy = torch.index_select(dy_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        dy.mul_(order.weight_M[span])
        dhidden, up = scratch("dhidden", size, inner), up_MH[span]
        _products(dy, down_NDH, chunk, dhidden)
        act, dup = scratch("act", size, inner), scratch("dup", size, inner)
        dgate = None
        if gate_NHD is not None:
            gate = gate_MH[span]
            torch.ops.aten.silu.out(gate, out=act)
            torch.mul(dhidden, act, out=dup)
            act.mul_(up)
            dgate = dhidden.mul_(up)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        else:
            torch.ops.aten.gelu.out(up, out=act)
            torch.ops.aten.gelu_backward.grad_input(dhidden, up, grad_input=dup)
        if ddown_NDH is not None:
            _outer_products(dy, act, chunk, ddown_NDH)
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        if dup_NHD is not None:
            _outer_products(dup, x, chunk, dup_NHD)
        if dgate_NHD is not None and dgate is not None:
            _outer_products(dgate, x, chunk, dgate_NHD)
        if need_x:
            dx = scratch("dx", size, width) if dx_MD is None else dx_MD[span]
            _products(dup, up_NHD, chunk, dx)
            if gate_NHD is not None and dgate is not None:
                _products(dgate, gate_NHD, chunk, dx, add=True)
            if dx_TD is not None:
                dx_TD.index_add_(0, order.token_M[span], dx)
    dweight_P = None
    if dx_MD is not None:
        dx_MD[total].zero_()
        dx_TD = _combine(dx_MD, order, x_TD.shape[0])
    if need_weight:
        # The gradient of embedding_bag's own weights: each pair's row of y times its token's row of dy.
        row_P, token_P = order.row_P, problem.token_P
        dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
        dweight_P = dot(dy_TD, y_MD, row_P, row_P, token_P, 0).to(weight_P.dtype)
    return [dx_TD, dweight_P, dgate_NHD, dup_NHD, ddown_NDH, None, None, None]


def _empty_gradient(weight: Tensor | None, empty: list[int]) -> Tensor | None:
    """A gradient to be filled expert by expert; exact zeros for the experts without rows."""
    if weight is None:
        return None
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert in empty:
        gradient[expert].zero_()
    return gradient


def _products(left_MX: Tensor, weights: Tensor, chunk: _Chunk, out_MX: Tensor, add: bool = False) -> None:
    """out[rows of e] (+)= left[rows of e] @ weights[e], for the experts of the chunk."""
    for batch in chunk.batches:
        left, right, into = batch.of(left_MX), batch.matrices(weights), batch.of(out_MX)
        if add:
            into.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=into)


def _outer_products(left_MX: Tensor, right_MX: Tensor, chunk: _Chunk, out_NXX: Tensor) -> None:
    """out[e] = left[rows of e]^T @ right[rows of e], for the experts of the chunk."""
    tall, wide = out_NXX.shape[1:]
    for batch in chunk.batches:
        first, experts, parts, rows, start = batch
        if parts == 1:
            into = _strided(out_NXX, (experts, tall, wide), (tall * wide, wide, 1), first * tall * wide)
            torch.bmm(batch.of(left_MX).mT, batch.of(right_MX), out=into)
            continue
        # Each part makes some rows of the result from all rows: a sum over parts would be made by all threads.
        count, parts = rows * parts, parts if tall % parts == 0 else 1
        left = _strided(left_MX, (parts, tall // parts, count), (tall // parts, 1, tall), start * tall)
        right = _strided(right_MX, (parts, count, wide), (0, wide, 1), start * wide)
        into = _strided(out_NXX, (parts, tall // parts, wide), (tall // parts * wide, wide, 1), first * tall * wide)
        torch.bmm(left, right, out=into)


run = operator("experts_portable", Kernel(_forward, _backward, _rows, outputs=True))
