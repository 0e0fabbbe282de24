# ruff: noqa: N815 (shape suffixes in field names)
"""Grouped expert compute: one function, several backends, the same numerics.

    y_t = sum over pairs (t, e, w) of  w * down_e( silu(gate_e x_t) * (up_e x_t) )   +   the shared experts' FFN of x_t

Shape suffixes: T tokens, K slots per token, P pairs, N experts, D width, H expert width, S width of all shared experts
together, M rows in expert order (the pairs that are not padding, each expert's rows rounded up to the alignment).

Backends:
    reference  a plain loop over experts under ordinary autograd: the oracle.
    portable   pure torch, one autograd function with a hand-written backward. Why it is laid out as it is:
               * rows lie in expert order, so that every product works on a contiguous slice and writes its result
                 (also the weight gradients) in place, with out=;
               * weights are unbound once: indexing w[i] under autograd writes a full-size zero gradient per expert;
               * elementwise work runs over chunks of several experts, small enough for the cache, large enough for
                 all threads;
               * the combine is one fused gather-and-sum (embedding_bag), which needs no atomics and so gives the same
                 bits every time;
               * only gate x and up x are saved for the backward; gathered inputs and hidden rows are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mue.moe.routing import Routing

# oneDNN builds a primitive for every new shape, about 1 ms each in bf16; float32 goes to MKL, which does not.
_ROW_ALIGNMENT = {torch.bfloat16: 32, torch.float16: 32}
# Elements of one chunk's (rows, H) buffer. Measured with benchmarks/moe_layer.py.
_CHUNK_ELEMENTS = 1 << 17


@dataclass
class ExpertWeights:
    """The matrices of one MoE block, (out, in) as in nn.Linear, expert axis first.

    Attributes:
        gate_NHD, up_NHD, down_NDH: routed experts; all None where there are none. gate None means gelu(up x).
        shared_gate_SD, shared_up_SD, shared_down_DS: the shared experts as one FFN of width S = n_s * h_s (the sum over
            experts of down_i(act_i) is one product over the concatenated width). None where there are none.
    """

    gate_NHD: Tensor | None = None
    up_NHD: Tensor | None = None
    down_NDH: Tensor | None = None
    shared_gate_SD: Tensor | None = None
    shared_up_SD: Tensor | None = None
    shared_down_DS: Tensor | None = None


def experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """Routed plus shared experts of every token; the output multiplier A is not applied here.

    The routed sum has the routing's weights (which contain R), the shared output has coefficient 1. Under autocast
    everything runs in autocast's dtype and the result has that dtype, as nn.Linear's would.

    Args:
        x_TD: (T, D) on any device.
        routing: any `Routing` over the same T tokens and N experts.
        weights: at least the routed or the shared experts.
        backend: "auto", "reference" or "portable"; all agree to rounding.

    Returns:
        (T, D), deterministic on CPU.

    Raises:
        ValueError: shapes that do not belong together, an expert index outside [0, N], an unknown backend.
    """
    _check(x_TD, routing, weights)
    run = BACKENDS.get("portable" if backend == "auto" else backend)
    if run is None:
        raise ValueError(f'backend={backend!r} is unknown: use "auto" or one of {sorted(BACKENDS)}')
    dtype = _compute_dtype(x_TD)
    cast = [
        None if weight is None else weight.to(dtype)
        for weight in (
            weights.gate_NHD,
            weights.up_NHD,
            weights.down_NDH,
            weights.shared_gate_SD,
            weights.shared_up_SD,
            weights.shared_down_DS,
        )
    ]
    with torch.autocast(x_TD.device.type, enabled=False):
        x_TD = x_TD.to(dtype)
        gate_NHD, up_NHD, down_NDH, gate_SD, up_SD, down_DS = cast
        y_TD: Tensor | None = None
        if up_NHD is not None and down_NDH is not None:
            y_TD = run(x_TD, routing, gate_NHD, up_NHD, down_NDH)
        if up_SD is not None and down_DS is not None:
            shared_TD = F.linear(_activation(x_TD, gate_SD, up_SD), down_DS)
            y_TD = shared_TD if y_TD is None else y_TD + shared_TD
    assert y_TD is not None  # _check
    return y_TD


def _compute_dtype(x: Tensor) -> torch.dtype:
    """autocast's dtype where it is on (it leaves float64 alone), else that of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _activation(x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
    """silu(gate x) * (up x), or gelu(up x) where there is no gate."""
    return F.gelu(F.linear(x, up)) if gate is None else F.silu(F.linear(x, gate)) * F.linear(x, up)


def _check(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> None:
    """Refuses shapes that broadcasting or a slice would otherwise swallow."""
    if x_TD.dim() != 2 or x_TD.shape[0] != routing.num_tokens:
        raise ValueError(f"x must be ({routing.num_tokens} tokens, width) for this routing, got {tuple(x_TD.shape)}")
    width, number = x_TD.shape[1], routing.num_experts
    routed = _check_ffn(
        "expert", (number,), width, {"gate": weights.gate_NHD, "up": weights.up_NHD, "down": weights.down_NDH}
    )
    shared = _check_ffn(
        "shared",
        (),
        width,
        {"gate": weights.shared_gate_SD, "up": weights.shared_up_SD, "down": weights.shared_down_DS},
    )
    if not routed and not shared:
        raise ValueError("there are neither routed nor shared experts: give up and down of at least one")
    if not routed and routing.num_pairs:
        raise ValueError(f"the routing has {routing.num_pairs} pairs but there are no routed experts")


def _check_ffn(name: str, lead: tuple[int, ...], width: int, parts: dict[str, Tensor | None]) -> bool:
    """True if this FFN is there; ValueError if it is there in part or with other shapes than the first."""
    gate, up, down = parts["gate"], parts["up"], parts["down"]
    if up is None or down is None:
        if any(part is not None for part in parts.values()):
            raise ValueError(f"{name} weights need both up and down (or none), got {_shapes(parts)}")
        return False
    inner = up.shape[-2] if up.dim() == len(lead) + 2 else 0
    wide, tall = (*lead, inner, width), (*lead, width, inner)
    if up.shape != wide or down.shape != tall or (gate is not None and gate.shape != wide):
        raise ValueError(f"{name} weights must be gate, up {wide} and down {tall}, (out, in); got {_shapes(parts)}")
    return True


def _shapes(parts: dict[str, Tensor | None]) -> str:
    return ", ".join(f"{name} {None if part is None else tuple(part.shape)}" for name, part in parts.items())


# --- reference -------------------------------------------------------------------------------------------------------


def _reference(x_TD: Tensor, routing: Routing, gate_NHD: Tensor | None, up_NHD: Tensor, down_NDH: Tensor) -> Tensor:
    """One expert after the other, as the formula reads; sums in at least float32."""
    _load(routing)  # the same refusal as the other backends
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    gates = [None] * routing.num_experts if gate_NHD is None else gate_NHD.unbind(0)
    for expert, (gate, up, down) in enumerate(zip(gates, up_NHD.unbind(0), down_NDH.unbind(0), strict=True)):
        pair = (routing.expert_P == expert).nonzero().squeeze(1)
        token = routing.token_P[pair]
        hidden = _activation(x_TD[token], gate, up) * routing.weight_P[pair, None]
        y_TD = y_TD.index_add(0, token, F.linear(hidden.to(x_TD.dtype), down).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def _load(routing: Routing) -> Tensor:
    """(N+1,) pairs per expert, the last being padding."""
    number = routing.num_experts
    if routing.num_pairs and int(routing.expert_P.min()) < 0:
        raise ValueError("expert_P holds a negative index: padding is marked by num_experts")
    load = torch.bincount(routing.expert_P, minlength=number + 1)
    if load.shape[0] > number + 1:
        raise ValueError(f"expert_P reaches {load.shape[0] - 1} but there are {number} experts (padding is {number})")
    return load


# --- portable --------------------------------------------------------------------------------------------------------


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
    """Sorts the pairs by expert: the only place that does."""
    load = _load(routing)
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


class _Experts(torch.autograd.Function):
    """Routed experts over rows in expert order. x_TD, weight_P and the weights get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_P: Tensor,
        gate_NHD: Tensor | None,
        up_NHD: Tensor,
        down_NDH: Tensor,
        order: _Order,
    ) -> Tensor:
        """(T, D), see `experts`."""
        width, inner, total = x_TD.shape[1], up_NHD.shape[1], order.token_M.shape[0]
        gate_MH = None if gate_NHD is None else x_TD.new_empty(total, inner)
        up_MH = x_TD.new_empty(total, inner)
        y_MD = x_TD.new_empty(total + 1, width)
        y_MD[total].zero_()
        chunks = _chunks(order.rows, -(-_CHUNK_ELEMENTS // inner))
        scratch = _Scratch(x_TD, max((chunk.stop - chunk.start for chunk in chunks), default=0))
        up_NDH, down_NHD = up_NHD.transpose(1, 2).unbind(0), down_NDH.transpose(1, 2).unbind(0)
        gate_NDH = None if gate_NHD is None else gate_NHD.transpose(1, 2).unbind(0)
        for chunk in chunks:
            span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
            x = torch.index_select(x_TD, 0, order.token_M[span], out=scratch("x", size, width))
            xs, hidden = x.split_with_sizes(chunk.rows), scratch("hidden", size, inner)
            up = up_MH[span]
            _products(xs, up_NDH, chunk, up)
            if gate_MH is not None and gate_NDH is not None:
                gate = gate_MH[span]
                _products(xs, gate_NDH, chunk, gate)
                torch.ops.aten.silu.out(gate, out=hidden)
                hidden.mul_(up)
            else:
                torch.ops.aten.gelu.out(up, out=hidden)
            hidden.mul_(order.weight_M[span])
            _products(hidden.split_with_sizes(chunk.rows), down_NHD, chunk, y_MD[span])
        ctx.save_for_backward(
            x_TD, weight_P, gate_NHD, up_NHD, down_NDH, gate_MH, up_MH,
            order.token_M, order.weight_M, order.row_P, order.bag, order.offset_T,
        )  # fmt: skip
        ctx.rows, ctx.chunks = order.rows, chunks
        return _combine(y_MD, order.bag, order.offset_T, x_TD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        (x_TD, weight_P, gate_NHD, up_NHD, down_NDH, gate_MH, up_MH,
         token_M, weight_M, row_P, bag, offset_T) = ctx.saved_tensors  # fmt: skip
        need_x, need_weight, need_gate, need_up, need_down = ctx.needs_input_grad[:5]
        width, inner, total = x_TD.shape[1], up_NHD.shape[1], token_M.shape[0]
        dy_TD = dy_TD.contiguous()
        dx_MD = x_TD.new_empty(total + 1, width) if need_x else None
        dweight_M = weight_M.new_zeros(total + 1) if need_weight else None
        dgate_NHD, dup_NHD, ddown_NDH = (
            _empty_gradient(weight, ctx.rows) if need else None
            for weight, need in ((gate_NHD, need_gate), (up_NHD, need_up), (down_NDH, need_down))
        )
        gates = () if gate_NHD is None else gate_NHD.unbind(0)
        ups, downs = up_NHD.unbind(0), down_NDH.unbind(0)
        into_gate, into_up, into_down = (
            None if gradient is None else gradient.unbind(0) for gradient in (dgate_NHD, dup_NHD, ddown_NDH)
        )
        chunks: list[_Chunk] = ctx.chunks
        scratch = _Scratch(x_TD, max((chunk.stop - chunk.start for chunk in chunks), default=0))
        for chunk in chunks:
            span, size = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
            dy = torch.index_select(dy_TD, 0, token_M[span], out=scratch("dy", size, width))
            dys, dhidden = dy.split_with_sizes(chunk.rows), scratch("dhidden", size, inner)
            _products(dys, downs, chunk, dhidden)
            weight, up = weight_M[span], up_MH[span]
            act, dup = scratch("act", size, inner), scratch("dup", size, inner)
            if gate_MH is not None:
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
            if gate_MH is not None:
                torch.mul(dhidden, silu, out=dup)
                dgate = dhidden.mul_(up)
                torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
            else:
                torch.ops.aten.gelu_backward.grad_input(dhidden, up, grad_input=dup)
            xs = torch.index_select(x_TD, 0, token_M[span], out=scratch("dy", size, width)).split_with_sizes(chunk.rows)
            dups, dgates = (
                dup.split_with_sizes(chunk.rows),
                None if dgate is None else dgate.split_with_sizes(chunk.rows),
            )
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
            dx_TD = _combine(dx_MD, bag, offset_T, x_TD.shape[0])
        if dweight_M is not None:
            dweight_P = dweight_M[row_P].to(weight_P.dtype)
        return dx_TD, dweight_P, dgate_NHD, dup_NHD, ddown_NDH, None


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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # row counts are data: a graph break until the native kernel
def _portable(x_TD: Tensor, routing: Routing, gate_NHD: Tensor | None, up_NHD: Tensor, down_NDH: Tensor) -> Tensor:
    """See the top of the file."""
    if routing.slots and not _is_token_major(routing):
        raise ValueError(f"slots={routing.slots} promises token_P = 0,0,..,1,1,..: give slots=0 for any other order")
    order = _order(routing, _ROW_ALIGNMENT.get(x_TD.dtype, 1))
    apply: Callable[..., Tensor] = _Experts.apply  # torch's own annotation is missing
    return apply(x_TD.contiguous(), routing.weight_P, gate_NHD, up_NHD, down_NDH, order)


def _is_token_major(routing: Routing) -> bool:
    token_T = torch.arange(routing.num_tokens, device=routing.token_P.device)
    return torch.equal(
        routing.token_P.view(routing.num_tokens, routing.slots), token_T[:, None].expand(-1, routing.slots)
    )


Backend = Callable[[Tensor, Routing, Tensor | None, Tensor, Tensor], Tensor]
BACKENDS: dict[str, Backend] = {"reference": _reference, "portable": _portable}
