"""What each branch adds to the residual stream: which layer's, of which kind, and what it was made of.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mue.checks.record import Added, Normed, Product, Record
from mue.rules.roles import ROLES


@dataclass(frozen=True)
class Branch:
    """One branch of one layer as it met the stream.

    Attributes:
        kind: ``"attention"`` or ``"feed-forward"``. added: the addition. products: those with the layer's parameters of that kind.
        ends: those of them that the branch was made of directly.
    """

    kind: str
    layer: int
    added: Added
    products: tuple[Product, ...]
    ends: tuple[Product, ...]

    @property
    def out(self) -> Tensor:
        """(T, D): as it met the stream."""
        return self.added.term.value.flatten(0, -2)

    @property
    def normed(self) -> Normed | None:
        """The norm that the branch ends in, if it does."""
        return self.added.term.normed

    @property
    def made(self) -> Tensor:
        """(T, D): what the weights gave, before a norm that ends the branch."""
        return self.out if self.normed is None else self.normed.given.reshape(-1, self.out.shape[-1])

    def last(self, *roles: str) -> Product | None:
        """The last product with a parameter of one of ``roles``."""
        return next((p for p in reversed(self.products) if p.info.role in roles), None)

    def scores(self, experts: int) -> Product | None:
        """The product that scores so many experts; the shared experts' own gate is a router of one."""
        return next((p for p in reversed(self.products) if p.info.role == "router" and p.info.fan_out == experts), None)

    @property
    def givens(self) -> list[Tensor]:
        """(T, D) each: what the feed-forward may read, the likeliest first.

        That is what its dense or shared part was given, or its router; routed experts see only some rows of theirs, so there
        is also the norm that ran before them.
        """
        reading = [p for p in self.products if ROLES[p.info.role].feed_forward and ROLES[p.info.role].reads_residual]
        reading.sort(key=lambda p: p.info.role == "router")
        whole = [p.given for p in reading if not p.transposed and p.given.shape[-1] == self.made.shape[-1]]
        whole += [p.normed.out for p in reading[:1] if p.normed is not None]
        found: list[Tensor] = []
        for t in whole:
            if t.numel() == self.made.numel():
                rows = t.reshape(self.made.shape)
                found += [rows] if not any(torch.equal(rows, other) for other in found) else []
        return found


def branches(record: Record) -> list[Branch]:
    """The branches of every block in the order of the forward pass; additions that belong to no block are left out.

    A branch is told by what it ends in: o for attention, a down projection for the feed-forward.
    """
    found: list[Branch] = []
    since: dict[tuple[int, str], int] = {}
    places = _layers(record.products)
    for added in record.added:
        layers = {layer for i in added.term.origin.products if (layer := places[i]) is not None}
        kind = record.kind(added.term.origin)
        if not layers or not kind:
            continue
        key = max(layers), kind
        own = [record.products[i] for i in range(since.get(key, 0), added.upto) if places[i] == key[0]]
        since[key] = added.upto
        mine = tuple(p for p in own if ROLES[p.info.role].feed_forward == (kind == "feed-forward"))
        found.append(Branch(kind, key[0], added, mine, tuple(record.ends(added.term.origin))))
    return found


def _layers(products: Sequence[Product]) -> list[int | None]:
    """The layer that each product ran in.

    Of weights that several layers read it is the layer of the last weights before them that lie in one alone (their router's, the
    attention's), where it is among theirs.
    """
    found: list[int | None] = []
    current: int | None = None
    for p in products:
        if len(p.info.layers) == 1:
            current = p.info.layer
        found.append(current if current in p.info.layers else p.info.layer)
    return found


def fit_sum(out: Tensor, parts: Sequence[Tensor]) -> tuple[list[float], float]:
    """(c, relative residual) of out = Σ c_i · parts_i by least squares, computed in float64.

    Args:
        out, parts: tensors of as many elements.

    Returns:
        ([], inf) where there are no parts.
    """
    if len(parts) == 1:
        c, residue = fit_ratio(out, parts[0])
        return [c], residue
    if not parts:
        return [], float("inf")
    y, M = out.double().flatten(), torch.stack([p.double().flatten() for p in parts], 1)
    c_P = torch.linalg.lstsq(M, y[:, None]).solution[:, 0]
    return c_P.tolist(), float((M @ c_P - y).norm() / y.norm().clamp(min=1e-300))


def fit_ratio(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """(c, relative residual) of out = c · reference by least squares.

    Args:
        out, reference: tensors of as many elements; computed with in float64.

    Returns:
        (nan, inf) where the reference is zero or ``out`` is not finite: no multiple of it is right then.
    """
    a, b = out.double().flatten(), reference.double().flatten()
    square = float(b @ b)
    if square == 0 or not bool(a.isfinite().all()):
        return float("nan"), float("inf")
    c = float(a @ b) / square
    return c, float((a - c * b).norm() / a.norm().clamp(min=1e-300))
