# ruff: noqa: N815 (shape suffixes in field names)
"""The portable backend: pure torch, a hand-written forward and backward. Why it is laid out as it is:

* rows lie in expert order, so that every product works on a contiguous slice and writes its result (also the weight
  gradients) in place, with out=;
* weights are unbound once: indexing w[i] under autograd writes a full-size zero gradient per expert;
* elementwise work runs over chunks of several experts, small enough for the cache, large enough for all threads;
* the combine is one fused gather-and-sum (embedding_bag), which needs no atomics and so gives the same bits every time;
* only gate x and up x are saved for the backward; gathered inputs and hidden rows are made again.

Shape suffixes: T tokens, K slots per token, P pairs, N experts, D width, H expert width, M rows in expert order (the pairs
that are not padding, each expert's rows rounded up to the alignment).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.operator import Inputs, Kernel, Problem, operator
from mue.moe.routing import Routing, expert_load

# oneDNN builds a primitive for every new shape, about 1 ms each in bf16; float32 goes to MKL, which does not.
_ROW_ALIGNMENT = {torch.bfloat16: 32, torch.float16: 32}
# Elements of one chunk's (rows, H) buffer. Measured with benchmarks/moe_layer.py.
_CHUNK_ELEMENTS = 1 << 17


@dataclass
class _Order:
    """Rows in expert order.

    Attributes:
        rows: rows of each expert, alignment included.
        token_M: (M,) the token of each row; an alignment row repeats its expert's last token.
        weight_M: (M, 1) the weight of each row, 0 for alignment rows.
        row_P: (P,) the row of each pair; M (a row of zeros) for padding pairs.
        bag: the pairs' rows by token, as `embedding_bag` wants them: (T, K), or flat with offsets.
        offset_T: (T,) where each token's bag begins, None for the (T, K) form.
    """

    rows: list[int]
    token_M: Tensor
    weight_M: Tensor
    row_P: Tensor
    bag: Tensor
    offset_T: Tensor | None


@torch.no_grad()
def _order(routing: Routing, alignment: int) -> _Order:
    """Sorts the pairs by expert."""
    if routing.slots and not _is_token_major(routing):
        raise ValueError(f"slots={routing.slots} promises token_P = 0,0,..,1,1,..: give slots=0 for any other order")
    load = expert_load(routing)
    counts = load.tolist()
    device, real = routing.expert_P.device, routing.num_pairs - counts.pop()
    pair_P = torch.argsort(routing.expert_P, stable=True)  # stable: rows of one expert stay in token order
    row_P = torch.empty_like(pair_P)
    if alignment == 1:
        rows, total, pair_M = counts, real, pair_P[:real]
        row_P[pair_P] = torch.arange(routing.num_pairs, device=device).clamp_(max=real)
        weight_M = routing.weight_P[pair_M]
    else:
        rows = [-(-count // alignment) * alignment for count in counts]
        total = sum(rows)
        load_N, rows_N = load[:-1], torch.tensor(rows, device=device)
        expert_M = torch.repeat_interleave(rows_N, output_size=total)
        rank_M = torch.arange(total, device=device) - (rows_N.cumsum(0) - rows_N)[expert_M]
        first_M, last_M = (load_N.cumsum(0) - load_N)[expert_M], (load_N - 1)[expert_M]
        pair_M = pair_P[first_M + torch.minimum(rank_M, last_M)]
        used_M = rank_M <= last_M
        row_P.fill_(total)
        row_P[pair_M[used_M]] = used_M.nonzero().squeeze(1)
        weight_M = routing.weight_P[pair_M] * used_M
    bag, offset_T = row_P, None
    if routing.slots:
        bag = row_P.view(routing.num_tokens, routing.slots)
    else:
        bag = row_P[torch.argsort(routing.token_P, stable=True)]
        pairs_T = torch.bincount(routing.token_P, minlength=routing.num_tokens)
        offset_T = pairs_T.cumsum(0) - pairs_T
    return _Order(rows, routing.token_P[pair_M], weight_M.unsqueeze(1), row_P, bag, offset_T)


def _combine(row_MD: Tensor, bag: Tensor, offset_T: Tensor | None, tokens: int) -> Tensor:
    """(T, D): the sum of each token's rows, in a fixed order. The last row of row_MD is the zero row."""
    if bag.numel() == 0:
        return row_MD.new_zeros(tokens, row_MD.shape[1])
    return F.embedding_bag(bag, row_MD, offset_T, mode="sum")


@dataclass
class _Chunk:
    """Consecutive experts whose elementwise work is done at once."""

    experts: list[int]
    rows: list[int]
    start: int
    stop: int


def _chunks(rows: list[int], limit: int) -> list[_Chunk]:
    """Groups experts, leaving out empty ones, until a chunk has `limit` rows."""
    chunks: list[_Chunk] = []
    stop = 0
    for expert, count in enumerate(rows):
        if count == 0:
            continue
        if not chunks or chunks[-1].stop - chunks[-1].start >= limit:
            chunks.append(_Chunk([], [], stop, stop))
        stop += count
        chunks[-1].experts.append(expert)
        chunks[-1].rows.append(count)
        chunks[-1].stop = stop
    return chunks


class _Scratch:
    """Buffers that chunks reuse: fresh memory costs page faults."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.like, self.rows = like, rows
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows, width)
        return self.buffers[name][:rows]


def _is_token_major(routing: Routing) -> bool:
    token_T = torch.arange(routing.num_tokens, device=routing.token_P.device)
    return torch.equal(
        routing.token_P.view(routing.num_tokens, routing.slots), token_T[:, None].expand(-1, routing.slots)
    )


def _plan(inputs: Inputs, problem: Problem) -> _Order:
    tokens = inputs.x_TD.shape[0]
    routing = Routing(
        problem.token_P, problem.expert_P, inputs.weight_P.detach(), tokens, problem.number, problem.slots
    )
    return _order(routing, _ROW_ALIGNMENT.get(problem.dtype, 1))


def _rows(problem: Problem) -> int:
    """Pairs, and the most that alignment can add."""
    pairs = problem.token_P.shape[0]
    return pairs + (_ROW_ALIGNMENT.get(problem.dtype, 1) - 1) * min(pairs, problem.number)


def _forward(inputs: Inputs, problem: Problem, saved: list[Tensor] | None) -> tuple[Tensor, _Order]:
    """(T, D), see `experts`."""
    x_TD, _, gate_NHD, up_NHD, down_NDH = inputs[:5]
    assert up_NHD is not None and down_NDH is not None
    order = _plan(inputs, problem)
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    if saved is None:
        gate_MH, up_MH = x_TD.new_empty(0 if gate_NHD is None else (total, inner)), x_TD.new_empty(total, inner)
    else:
        gate_MH, up_MH = saved[0], saved[1]
    y_MD = x_TD.new_empty(total + 1, width)
    y_MD[total].zero_()
    chunks = _chunks(order.rows, -(-_CHUNK_ELEMENTS // inner))
    scratch = _Scratch(x_TD, max((chunk.stop - chunk.start for chunk in chunks), default=0))
    up_NDH, down_NHD = up_NHD.transpose(1, 2).unbind(0), down_NDH.transpose(1, 2).unbind(0)
    gate_NDH = None if gate_NHD is None else gate_NHD.transpose(1, 2).unbind(0)
    for chunk in chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("x", size, width))
        xs, hidden, up = x.split_with_sizes(chunk.rows), scratch("hidden", size, inner), up_MH[span]
        _products(xs, up_NDH, chunk, up)
        if gate_NDH is not None:
            gate = gate_MH[span]
            _products(xs, gate_NDH, chunk, gate)
            torch.ops.aten.silu.out(gate, out=hidden)
            hidden.mul_(up)
        else:
            torch.ops.aten.gelu.out(up, out=hidden)
        hidden.mul_(order.weight_M[span])
        _products(hidden.split_with_sizes(chunk.rows), down_NHD, chunk, y_MD[span])
    return _combine(y_MD, order.bag, order.offset_T, x_TD.shape[0]), order


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
    gate_MH, up_MH, weight_M = saved[0], saved[1], order.weight_M
    width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
    dx_MD = x_TD.new_empty(total + 1, width) if need_x else None
    dweight_M = weight_M.new_zeros(total + 1) if need_weight else None
    dgate_NHD, dup_NHD, ddown_NDH = (
        _empty_gradient(weight, order.rows) if need else None
        for weight, need in ((gate_NHD, need_gate), (up_NHD, need_up), (down_NDH, need_down))
    )
    gates = () if gate_NHD is None else gate_NHD.unbind(0)
    ups, downs = up_NHD.unbind(0), down_NDH.unbind(0)
    into_gate, into_up, into_down = (
        None if gradient is None else gradient.unbind(0) for gradient in (dgate_NHD, dup_NHD, ddown_NDH)
    )
    chunks = _chunks(order.rows, -(-_CHUNK_ELEMENTS // inner))
    scratch = _Scratch(x_TD, max((chunk.stop - chunk.start for chunk in chunks), default=0))
    for chunk in chunks:
        span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        dy = torch.index_select(dy_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        dys, dhidden = dy.split_with_sizes(chunk.rows), scratch("dhidden", size, inner)
        _products(dys, downs, chunk, dhidden)
        weight, up = weight_M[span], up_MH[span]
        act, dup = scratch("act", size, inner), scratch("dup", size, inner)
        if gates:
            gate, silu = gate_MH[span], scratch("silu", size, inner)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=act)
        else:
            torch.ops.aten.gelu.out(up, out=act)
        if dweight_M is not None:
            torch.mul(dhidden, act, out=dup)
            torch.sum(dup, 1, dtype=dweight_M.dtype, out=dweight_M[span])
        if into_down is not None:
            act.mul_(weight)
            _outer_products(dys, act.split_with_sizes(chunk.rows), chunk, into_down)
        dhidden.mul_(weight)
        dgate = None
        if gates:
            torch.mul(dhidden, silu, out=dup)
            dgate = dhidden.mul_(up)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        else:
            torch.ops.aten.gelu_backward.grad_input(dhidden, up, grad_input=dup)
        x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("dy", size, width))
        xs, dups = x.split_with_sizes(chunk.rows), dup.split_with_sizes(chunk.rows)
        dgates = None if dgate is None else dgate.split_with_sizes(chunk.rows)
        if into_up is not None:
            _outer_products(dups, xs, chunk, into_up)
        if into_gate is not None and dgates is not None:
            _outer_products(dgates, xs, chunk, into_gate)
        if dx_MD is not None:
            _products(dups, ups, chunk, dx_MD[span])
            if dgates is not None:
                _products(dgates, gates, chunk, dx_MD[span], add=True)
    dx_TD = dweight_P = None
    if dx_MD is not None:
        dx_MD[total].zero_()
        dx_TD = _combine(dx_MD, order.bag, order.offset_T, x_TD.shape[0])
    if dweight_M is not None:
        dweight_P = dweight_M[order.row_P].to(weight_P.dtype)
    return [dx_TD, dweight_P, dgate_NHD, dup_NHD, ddown_NDH, None, None, None]


def _empty_gradient(weight: Tensor | None, rows: list[int]) -> Tensor | None:
    """A gradient to be filled expert by expert; exact zeros for the experts without rows."""
    if weight is None:
        return None
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, count in enumerate(rows):
        if count == 0:
            gradient[expert].zero_()
    return gradient


def _products(
    lefts: tuple[Tensor, ...], weights: tuple[Tensor, ...], chunk: _Chunk, out: Tensor, add: bool = False
) -> None:
    """out[rows of e] (+)= left[rows of e] @ weights[e], for the experts of the chunk."""
    for left, expert, into in zip(lefts, chunk.experts, out.split_with_sizes(chunk.rows), strict=True):
        if add:
            into.addmm_(left, weights[expert])
        else:
            torch.mm(left, weights[expert], out=into)


def _outer_products(
    lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...], chunk: _Chunk, outs: tuple[Tensor, ...]
) -> None:
    """outs[e] = left[rows of e]^T @ right[rows of e], for the experts of the chunk."""
    for left, right, expert in zip(lefts, rights, chunk.experts, strict=True):
        torch.mm(left.t(), right, out=outs[expert])


run = operator("experts_portable", Kernel(_forward, _backward, _rows))
