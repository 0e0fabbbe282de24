# ruff: noqa: N815 (shape suffixes in field names)
"""How the portable backend lays out rows: in expert order, in batches that give every thread whole products, in chunks.

Shape suffixes: as in `mue.moe.backends.portable`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mue.moe.routing import Routing, expert_load

__all__ = ["MOST_WASTE", "Batch", "Chunk", "Order", "layout", "order_of", "sorted_pairs", "strided"]

# What was measured with benchmarks/moe_layer.py on 2 cores (docs/LOG.md, "The portable experts in batches").
_CHUNK_ELEMENTS = 1 << 18  # of one chunk's (rows, H) buffer
_BATCH_COST = (
    5 << 23,
    9 << 23,
)  # multiply-adds of one batch of experts, by whether experts are cut; larger ones gain nothing
_JOINING = 1 << 21  # multiply-adds in alignment rows that one call less is worth
MOST_WASTE = 8  # of so many rows of a batch one may be alignment
_JOINED = (4, 2), (4, 2, 1)  # experts of a batch for each part: alone, and where an expert alone is cut into parts
_RADIX = 1 << 15  # torch sorts so many integers, or more, in linear time


class Batch(NamedTuple):
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
        return strided(x_MX, (number, self.rows, width), (self.rows * width, width, 1), self.start * width)

    def matrices(self, w_NXX: Tensor, first: int | None = None) -> Tensor:
        """(B, out, in): each expert's or part's own; the batch's own experts begin with that of number `first`."""
        apart, *strides = w_NXX.stride()
        shape = (self.experts * self.parts, *w_NXX.shape[1:])
        first = self.first if first is None else first
        return strided(w_NXX, shape, (apart if self.parts == 1 else 0, *strides), first * apart)


def strided(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """A view in one call; slicing, viewing and expanding cost a few microseconds each."""
    return x.as_strided(shape, strides, x.storage_offset() + offset)


@dataclass
class Chunk:
    """Consecutive batches whose elementwise work is done at once."""

    batches: list[Batch]
    start: int
    stop: int


@dataclass
class Order:
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

    chunks: list[Chunk]
    empty: list[int]
    token_M: Tensor
    weight_M: Tensor
    row_P: Tensor
    bag: Tensor
    bag_P: Tensor | None
    offset_T: Tensor | None


@torch.no_grad()
def order_of(routing: Routing, width: int, inner: int, alignment: int, parts: int, dtype: torch.dtype) -> Order:
    """Sorts the pairs by expert and lays out their rows.

    Args:
        width, inner: D and H. alignment: rows of an expert, or of a batch's part, are a multiple of this.
        parts: into how many parts an expert alone is cut. dtype: of the rows.

    Raises:
        ValueError: pairs that are not where ``slots`` promises them, or an expert index outside [0, N].
    """
    # the (T, K) form of the combine takes the order for granted
    if routing.slots and not _is_token_major(routing):
        raise ValueError(f"slots={routing.slots} promises token_P = 0,0,..,1,1,..: give slots=0 for any other order")
    counts = expert_load(routing).tolist()
    pairs, real = routing.num_pairs, routing.num_pairs - counts.pop()
    chunks, rows = layout(counts, alignment, parts, width * inner, _CHUNK_ELEMENTS // inner)
    total = sum(rows)
    pair_P = sorted_pairs(routing.expert_P, routing.num_experts)
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
        # ragged: embedding_bag wants each token's rows side by side, and where they begin
        bag_P = torch.argsort(routing.token_P, stable=True)
        bag = row_P[bag_P]
        pairs_T = torch.bincount(routing.token_P, minlength=routing.num_tokens)
        offset_T = pairs_T.cumsum(0) - pairs_T
    token_M = routing.token_P.index_select(0, pair_M)
    empty = [expert for expert, row in enumerate(rows) if row == 0]
    return Order(chunks, empty, token_M, weight_M.to(dtype).unsqueeze(1), row_P, bag, bag_P, offset_T)


def sorted_pairs(expert_P: Tensor, number: int) -> Tensor:
    """(P,) the pairs by expert; stable, so that rows of one expert stay in token order."""
    pairs = expert_P.shape[0]
    # Padding up to the linear sort pays from an eighth of its length on; int16 holds numbers of experts below 2^15.
    if not expert_P.is_cpu or number >= 1 << 15 or pairs < _RADIX // 8:
        return expert_P.argsort(stable=True)
    padded = expert_P.new_full((max(pairs, _RADIX),), number, dtype=torch.uint8 if number < 256 else torch.int16)
    padded[:pairs] = expert_P
    return padded.argsort(stable=True)[:pairs]


def layout(counts: list[int], alignment: int, parts: int, cost: int, most: int) -> tuple[list[Chunk], list[int]]:
    """Chunks of `most` rows, if no batch alone has more, and the rows of each expert.

    Experts go into one batch where the alignment rows cost less than the calls that are saved; `cost` is a row's.
    """
    chunks: list[Chunk] = []
    rows: list[int] = []
    first = start = 0
    while first < len(counts):
        size, cut, row = 1, parts, -(-counts[first] // alignment) * alignment
        largest = _BATCH_COST[parts > 1] // cost
        # multiples of the threads, so that each has whole products; most experts first, for a call costs 20–40 µs
        step = alignment if parts == 1 else 1  # a batch's rows need no parts
        for several in _JOINED[parts > 1] if alignment > 1 else ():
            several, some = several * parts, counts[first : first + several * parts]
            padded = several * (-(-max(some) // step) * step)
            # alignment rows are work for nothing: at most an eighth, and no more than the saved calls are worth
            waste = min(padded // MOST_WASTE, (several - 1) * _JOINING // cost)
            if len(some) == several and min(some) and padded <= largest and padded - sum(some) <= waste:
                size, cut, row = several, 1, padded // several
                break
        stop = start + size * row
        if row:
            if not chunks or stop - chunks[-1].start > most:
                chunks.append(Chunk([], start, start))
            chunks[-1].batches.append(Batch(first, size, cut, row // cut, start - chunks[-1].start))
            chunks[-1].stop = stop
        rows += [row] * size
        first, start = first + size, stop
    return chunks, rows


def _is_token_major(routing: Routing) -> bool:
    token_T = torch.arange(routing.num_tokens, device=routing.token_P.device)
    return torch.equal(
        routing.token_P.view(routing.num_tokens, routing.slots), token_T[:, None].expand(-1, routing.slots)
    )
