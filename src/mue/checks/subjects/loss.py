"""Is the loss a mean over tokens? The first step of an Adam does not know: its size is the same for any multiple of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mue.checks.context import Context, Loss, evaluating
from mue.checks.record import Record
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding
from mue.checks.trace import traced
from mue.util.text import number

NAME = "loss"


@check_of(NAME, place=7.5, needs=("roles", "values", "batch"))
def loss(ctx: Context) -> Iterator[Finding]:
    """The loss that trains against the mean of the cross-entropy that was computed on the way (eps, clipping); what it asks for."""
    record, out = ctx.seen if ctx.loss is None else _own(ctx, ctx.loss)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if isinstance(found, tuple | list):
        found = next((t for t in found if isinstance(t, Tensor) and t.numel() == 1), None)
    if not isinstance(found, Tensor) or found.numel() != 1 or not record.entropies:
        yield Finding(NAME, SKIP, measured="no cross-entropy was seen in what the model computes")
        return
    yield from _copied(record)
    mean, targets = max(record.entropies, key=lambda entropy: entropy[1])
    ratio = float(found) / mean if mean else 1.0
    # beside the cross-entropy there may be losses of the routers, or of a few more heads, but not as many as tokens
    if ratio > max(math.sqrt(targets), 2.0):
        yield Finding(
            NAME,
            FAIL,
            "loss",
            f"a mean over tokens: cross-entropy {number(mean)} over {targets}",
            f"{number(float(found))}, {number(ratio)} times as much",
            ("the loss is summed over tokens: eps and clipping then see gradients as many times as large",),
            'reduction="mean", or divide by the number of targets',
        )
    else:
        yield Finding(NAME, PASS, measured=f"cross-entropy is a mean over {targets} targets")


def _own(ctx: Context, loss: Loss) -> tuple[Record, Any]:
    """One pass with the user's own loss, which the model's forward does not have in it."""
    with evaluating(ctx.model):
        return traced(ctx.placed, ctx.plan.target.width, lambda: loss(ctx.model, ctx.batch))


def _copied(record: Record) -> Iterator[Finding]:
    """A warning where every target is the token that was read there: a batch that stands in for one, or a shift that is missing."""
    for read in record.read:
        if any(t.numel() == read.numel() and torch.equal(t.flatten(), read.flatten()) for t in record.targets):
            yield Finding(
                NAME,
                WARN,
                "targets",
                "the next token",
                "the token that the model reads at that place",
                (
                    "logits and targets are not shifted against each other",
                    "the batch has the inputs as targets, for this check",
                ),
                "cross_entropy(logits[:, :-1].mT, ids[:, 1:])",
            )
            return
