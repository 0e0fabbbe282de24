"""How the projections fused in one tensor lie along its rows: found by silencing one, and seeing that the others no longer count.

Where all values are zero, queries and keys do nothing; where all gates are, the up projection. Rows that are cut otherwise than the
model cuts them are not silenced together. Nothing is concluded from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mue.layouts.layout import BLOCKS, HEADS, ROWS, UNKNOWN, Layout, canonical, pattern_of
from mue.layouts.observe.flow.graph import given_tensors
from mue.rules.roles import ROLES

LOUD = 4.0  # the tensors are watched at this many times their size, or queries and keys near zero would do nothing
SEEN, NONE = 1e-4, 0.02  # a change of the output, of its own size; and what is none beside one that is seen


@torch.no_grad()
def part_orders(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    rows: Mapping[str, Layout],
    heads: int | None,
    kv_heads: int | None,
) -> dict[str, str]:
    """Pattern of a fused tensor → the order of its parts.

    Args:
        model: the tiny model, off its start. run: its forward pass. rows: its decided rows, by pattern of names. heads, kv_heads: of
            its attention, where the config says so.

    Returns:
        One of :data:`mue.layouts.layout.ORDERS` for each row with several parts: the first that holds, ``"unknown"`` where none
        does or where the pass shows nothing.
    """
    found: dict[str, str] = {}
    named = {canonical(n): p for n, p in model.named_parameters()}
    biases = [p for n, p in named.items() if (row := rows.get(pattern_of(n))) is not None and row.role == "bias"]
    for pattern, row in rows.items():
        tensors = [p for n, p in named.items() if pattern_of(n) == pattern]
        if len(row.parts) > 1 and tensors:
            with _kept([*biases, *tensors]):
                for bias in biases:
                    bias.zero_()  # a value's bias is a value
                found[pattern] = _order(model, run, row, tensors, heads or 0, kv_heads or heads or 0)
    return found


def _order(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    row: Layout,
    tensors: Sequence[Tensor],
    heads: int,
    kv_heads: int,
) -> str:
    """The first order in which the parts can be told apart as the model does."""
    if row.axes.count("out") != 1:
        return UNKNOWN
    views = [p.movedim(row.axes.index("out"), 0) for p in tensors]
    for view in views:
        view *= LOUD
    whole = _output(model, run)
    for order, parts in _candidates(row, len(views[0]), heads, kv_heads):
        quiet = len(parts) - 1 if ROLES[row.role].kind == "attention" else 0
        others = {i: -2.0 for i in range(len(parts)) if i != quiet}
        silenced = _changed(model, run, views, {quiet: 0.0}, parts)
        heard = _apart(whole, silenced)
        if _apart(silenced, _changed(model, run, views, {quiet: 0.0, **others}, parts)) > NONE * heard:
            continue
        # queries twice, keys half as large: the same products, also where both are normed
        if len(parts) == 3:
            alone, both = (_apart(whole, _changed(model, run, views, f, parts)) for f in ({0: 2.0}, {0: 2.0, 1: 0.5}))
            if both > NONE * max(alone, NONE * heard):  # behind a norm neither does a thing
                continue
        return order if heard > SEEN else UNKNOWN
    return UNKNOWN


def _candidates(row: Layout, rows: int, heads: int, kv_heads: int) -> Iterator[tuple[str, list[Tensor]]]:
    """(order, rows of each part)."""
    at = torch.arange(rows)
    if len(row.parts) == 2:
        if rows % 2 == 0:
            yield BLOCKS, list(at.chunk(2))
            yield ROWS, [at[::2], at[1::2]]
            if ROLES[row.role].kind == "attention" and kv_heads and rows % (2 * kv_heads) == 0:
                yield HEADS, list(at.view(kv_heads, 2, -1).unbind(1))
        return
    # a config may leave its one head of keys unsaid (multi-query), or name it where nobody looks
    for keys in dict.fromkeys(k for k in (kv_heads, 1, heads) if k):
        if len(row.parts) != 3 or heads % keys or rows % (heads + 2 * keys):
            continue
        size, queries = rows // (heads + 2 * keys), heads // keys
        yield BLOCKS, list(torch.split(at, [heads * size, keys * size, keys * size]))
        if keys > 1:
            parts = torch.split(at.view(keys, -1), [queries * size, size, size], dim=1)
            yield HEADS, [part.flatten() for part in parts]


def _changed(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    views: Sequence[Tensor],
    factors: Mapping[int, float],
    parts: Sequence[Tensor],
) -> Tensor:
    """The output with some parts times a factor."""
    with _kept(views):
        for view in views:
            for part, factor in factors.items():
                view[parts[part]] *= factor
        return _output(model, run)


def _output(model: nn.Module, run: Callable[[nn.Module], object]) -> Tensor:
    torch.manual_seed(1)  # the same tokens in every pass
    tensors = given_tensors(run(model))
    # logits, where a loss stands beside them; a pass that gives nothing shows nothing
    return max(tensors, key=Tensor.numel).float() if tensors else torch.zeros(1)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


@contextmanager
def _kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    kept = [p.clone() for p in tensors]
    try:
        yield
    finally:
        for p, old in zip(tensors, kept, strict=True):
            p.copy_(old)
