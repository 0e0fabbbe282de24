"""Is an image drawn by itself? What comes of one must not depend on what else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mue.checks.branches import Branch, branches
from mue.checks.context import Context, evaluating, forward, logits_of
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several
from mue.checks.trace import traced
from mue.layouts.layout import unwrap
from mue.util.text import number

NAME = "samples"
ROUNDING = (
    1e-3  # of the outputs' size: products of other sizes round otherwise, and experts that change differ by far more
)


@check_of(NAME, place=9.5, needs=("roles", "values", "batch"), task="image")
def samples(ctx: Context) -> Iterator[Finding]:
    """The first half of the batch alone, against the same images in the whole batch: every branch before its gate, and the velocity."""
    if ctx.plan.target.image is None:
        yield Finding(NAME, SKIP, measured="the plan is of no model of images")
        return
    whole = logits_of(ctx.seen[1])
    half = None if whole is None else _first(ctx.batch, len(whole), len(whole) // 2)
    if whole is None or half is None:
        yield Finding(NAME, SKIP, measured="a batch of tensors with at least two images is needed")
        return
    inner = unwrap(ctx.model)
    with evaluating(inner):
        record, out = traced(ctx.placed, ctx.plan.target.width, lambda: forward(inner, half))
    alone = logits_of(out)
    assert alone is not None
    here = branches(record)
    alike = bool(here) and len(here) == len(ctx.branches)
    pairs = [(_name(ctx, b), b.out, a.out) for a, b in zip(here, ctx.branches, strict=True)] if alike else []
    off = {name: _off(x, y) for name, x, y in [*pairs, ("the velocity", whole, alone)]}
    wrong = {name: d for name, d in off.items() if not d < max(ROUNDING, ctx.tolerance)}
    if wrong:
        yield Finding(
            NAME,
            FAIL,
            several(wrong),
            "an image is drawn by itself, whatever else is in the batch",
            f"{number(max(wrong.values()))} of its size changes with the batch",
            ("experts choose from the whole batch", "statistics of the batch in a norm"),
            'router = {name = "expert-choice", within = "sequence"}, or a router by token',
            len(wrong),
        )
    elif not alike:
        text = f"{len(here)} branches are seen of half the batch, and {len(ctx.branches)} of all of it"
        yield Finding(NAME, SKIP, measured=text)
    else:
        text = f"{len(alone)} images alone as in a batch of {len(whole)}, in {len(here)} branches"
        yield Finding(NAME, PASS, measured=text)


def _name(ctx: Context, b: Branch) -> str:
    """The branch's router, where it has one: it is what looks at the batch."""
    routers = (p.name for p in ctx.placed if p.role == "router" and b.layer in p.layers)
    return (
        next(routers, f"blocks {b.layer} feed-forward") if b.kind == "feed-forward" else f"blocks {b.layer} attention"
    )


def _off(whole: Tensor, alone: Tensor) -> float:
    """How far the first of many rows are from the same ones alone, of their largest."""
    return float((alone - whole[: len(alone)]).abs().max() / whole.abs().max().clamp(min=1e-30))


def _first(batch: Any, images: int, many: int) -> Any:
    """The batch with its first images only; None of one that is not understood, or that has no two."""
    if many < 1:
        return None
    if isinstance(batch, Mapping):
        cut = {name: _cut(part, images, many) for name, part in batch.items()}
        return None if any(part is None for part in cut.values()) else cut
    if isinstance(batch, tuple | list):
        parts = tuple(_cut(part, images, many) for part in batch)
        return None if any(part is None for part in parts) else parts
    return _cut(batch, images, many)


def _cut(part: Any, images: int, many: int) -> Any:
    if not isinstance(part, Tensor):
        return part
    return part[:many] if part.dim() and len(part) == images else None
