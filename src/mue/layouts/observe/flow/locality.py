"""Queries and keys where no softmax tells them apart: a query acts at its own position alone, a key at others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mue.layouts.layout import canonical
from mue.layouts.observe.flow.graph import GraphRecorder, plain_kernels


class _Replay(GraphRecorder):  # type: ignore[no-untyped-call]
    """The same pass again, with one position of one node's values changed, to read another node's."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], given: Iterable[Tensor], row: int, change: int, read: int):
        self.row, self.change, self.read = row, change, read
        self.seen: Tensor | None = None
        super().__init__(named, given)

    def _add(self, t: Tensor, *more: object, **keywords: object) -> int:
        n = super()._add(t, *more, **keywords)  # type: ignore[arg-type]
        if n == self.change:
            t.view(-1, t.shape[-1])[self.row].mul_(1.5).add_(0.1)
        if n == self.read:
            self.seen = t.clone()
        return n


def acts_at_its_own_position(
    model: nn.Module, run: Callable[[], object], given: list[Tensor], change: int, read: int
) -> bool | None:
    """Whether what a matrix puts out for one token is felt by another one at that token alone.

    Args:
        model, run, given: as they were recorded. change, read: nodes of that recording: the matrix's product, with a row for
            each token, and what the other reads.

    Returns:
        None where it is not felt at all, or positions could not be counted.
    """
    tokens = next((t for t in given if t.dim() == 2 and not t.is_floating_point()), None)
    if tokens is None:
        return None
    row = tokens.shape[1] // 2
    named = [(canonical(n), p) for n, p in model.named_parameters()]
    seen = []
    for target in (-1, change):
        with torch.no_grad(), plain_kernels(), _Replay(named, given, row, target, read) as replay:
            run()
        if replay.seen is None or replay.seen.numel() % tokens.numel():
            return None
        seen.append(replay.seen.reshape(tokens.numel(), -1))
    moved = (seen[0] != seen[1]).any(1).nonzero().flatten().tolist()
    return None if not moved else moved == [row]
