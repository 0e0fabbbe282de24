"""Is the loss a mean over tokens? The first step of an Adam does not know: its size is the same for any multiple of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding
from mue.util.text import number

NAME = "loss"


@check_of(NAME, place=7.5, needs=("roles", "values", "batch"))
def loss(ctx: Context) -> Iterator[Finding]:
    """What the model returns as its loss, against the mean of the cross-entropy that was computed on the way (eps, clipping)."""
    record, out = ctx.seen
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if isinstance(found, tuple | list):
        found = next((t for t in found if isinstance(t, Tensor) and t.numel() == 1), None)
    if ctx.loss is not None or not isinstance(found, Tensor) or found.numel() != 1 or not record.entropies:
        yield Finding(NAME, SKIP, measured="no cross-entropy was seen in what the model computes")
        return
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
