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
_UNTIE = "a head of its own (tie_word_embeddings=False), then plan.init_(model); or plan with tied=True"


@check_of(NAME, place=2, needs=("roles",))
def tied(ctx: Context) -> Iterator[Finding]:
    """Head and embedding are one tensor if and only if the plan says so; nothing else shares memory."""
    found = [*_head(ctx), *_shared(ctx)]
    yield from found
    if not found:
        yield Finding(NAME, PASS, measured="head is the embedding" if ctx.plan.target.tied else "nothing is tied")


def _head(ctx: Context) -> Iterator[Finding]:
    """Whether head and embedding are one tensor exactly where the plan has them as one, by name, by memory and by numbers."""
    embedding = next((p for p in ctx.placed if p.role == "embedding" and p.parameter.shape[0] == _vocab(ctx)), None)
    if embedding is None:
        embedding = next((p for p in ctx.placed if p.role == "embedding"), None)
    head = next((p for p in ctx.placed if p.role == "head"), None)
    if embedding is None:
        return
    planned = ctx.plan.target.tied
    measured, where = "", embedding.name if head is None else head.name
    if head is None:
        # a head that is the embedding has no parameter of its own; whether it has a name does not matter
        if not planned:
            others = [n for n in _names(ctx)[id(embedding.parameter)] if n != embedding.name]
            measured = f"the head is the embedding ({', '.join(others)})" if others else "no head beside the embedding"
    elif planned:
        measured = _how_apart(ctx, head.parameter, embedding.parameter)
    elif not ctx.meta:  # without values or memory there is nothing that two tensors could share
        how = _how_apart(ctx, head.parameter, embedding.parameter)
        measured = "" if how == "a tensor of its own" else how
    if measured:
        yield Finding(
            NAME,
            FAIL,
            where,
            f"the same tensor as {embedding.name}" if planned else f"a tensor of its own beside {embedding.name}",
            measured,
            (
                "tied by copying the values instead of sharing the parameter",
                "untied by a deep copy, a wrapper or a loader",
            )
            if planned
            else ("tied in the model (tie_word_embeddings) where the plan has tied=False", "started as a copy"),
            "model.head.weight = model.embedding.weight  # and tied=True in the target" if planned else _UNTIE,
        )


def _vocab(ctx: Context) -> int:
    return ctx.plan.target.vocab


def _how_apart(ctx: Context, head: torch.Tensor, embedding: torch.Tensor) -> str:
    """In words, what two parameters have in common."""
    if not ctx.meta and head.data_ptr() == embedding.data_ptr():
        return "another parameter on the same memory"
    if not ctx.meta and head.shape == embedding.shape and torch.equal(head, embedding):
        return "a copy of it"
    return "a tensor of its own"


def _names(ctx: Context) -> dict[int, list[str]]:
    """Every name of every parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in ctx.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    return names


def _shared(ctx: Context) -> Iterator[Finding]:
    """Other tensors under two names, or on one memory: each use adds to one gradient, which no rule here plans."""
    for i, many in _names(ctx).items():
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
