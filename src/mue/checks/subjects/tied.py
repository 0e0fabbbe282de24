"""Are exactly those tensors one that should be? Needs no forward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, WARN, Finding, several
from mue.layouts.layout import canonical

NAME = "tied weights"
_MAY = ("embedding", "head")


@check_of(NAME, place=2, needs=("roles",))
def tied(ctx: Context) -> Iterator[Finding]:
    """Head and embedding are one tensor if and only if the plan says so; nothing else shares memory (C4)."""
    found = [*_head(ctx), *_shared(ctx)]
    yield from found
    if not found:
        yield Finding(NAME, PASS, measured="head is the embedding" if ctx.plan.target.tied else "nothing is tied")


def _head(ctx: Context) -> Iterator[Finding]:
    """Whether head and embedding, where they are two tensors, have one memory or the same numbers."""
    embedding = next((p for p in ctx.placed if p.role == "embedding"), None)
    head = next((p for p in ctx.placed if p.role == "head"), None)
    if embedding is None:
        return
    # without values or memory there is nothing to compare; whether there is a head at all is coverage's
    if head is None or ctx.meta:
        return
    same = head.parameter.shape == embedding.parameter.shape and torch.equal(head.parameter, embedding.parameter)
    if same or head.parameter.data_ptr() == embedding.parameter.data_ptr():
        yield Finding(
            NAME,
            FAIL,
            head.name,
            f"a tensor of its own beside {embedding.name}"
            if not ctx.plan.target.tied
            else f"the same tensor as {embedding.name}",
            "a copy of it"
            if head.parameter.data_ptr() != embedding.parameter.data_ptr()
            else "another parameter on the same memory",
            (
                "tied by copying the values instead of sharing the parameter",
                "untied by a deep copy, a wrapper or a loader",
            ),
            "model.head.weight = model.embedding.weight  # and tied=True in the target"
            if ctx.plan.target.tied
            else "plan.init_(model)",
        )


def _shared(ctx: Context) -> Iterator[Finding]:
    """Other tensors under two names, or on one memory: each use adds to one gradient, which no rule here plans."""
    names: dict[int, list[str]] = {}
    for name, parameter in ctx.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    for i, many in names.items():
        role = ctx.names[i].role if i in ctx.names else ""
        if len(many) > 1 and role not in _MAY:
            yield Finding(
                NAME,
                WARN,
                several(many),
                "a tensor for every name",
                f"one tensor under {len(many)} names",
                ("layers that share their weights: each use adds to one gradient, which no rule here plans",),
                "untie them, or leave them if that is meant",
            )
    if ctx.meta:
        return
    ranges: dict[int, str] = {}
    for p in ctx.placed:
        # two Parameters on one memory are moved twice a step by any optimizer
        here = p.parameter.data_ptr()
        if here and here in ranges and p.role not in _MAY:
            yield Finding(
                NAME,
                FAIL,
                f"{p.name}, {ranges[here]}",
                "memory of their own",
                "two parameters on the same memory",
                ("one was made from the other's .data",),
                "p.data = p.data.clone()",
            )
        ranges.setdefault(here, p.name)
