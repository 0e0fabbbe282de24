"""Parameters that a stock family's own code gives no gradient: they only choose (the indexers of sparse attention), or are not used."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import pattern_of, unwrap
from mue.layouts.observe.describe import TINY_BATCH
from mue.layouts.observe.run import run_tokens
from mue.layouts.transformers.configs import build, default_config
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.stock import is_stock
from mue.layouts.transformers.tiny import shrink


def idle_in_family(model: nn.Module) -> frozenset[str]:
    """Patterns of the parameters without a gradient in a tiny model of the family, as ``transformers`` has it.

    Args:
        model: any; of one whose class is not of ``transformers`` itself nothing is known.
    """
    inner: Any = unwrap(model)
    if not is_stock(model) or not type(inner).__module__.startswith("transformers."):
        return frozenset()
    return _idle(str(inner.config.model_type))


@cache
def _idle(family: str) -> frozenset[str]:
    try:
        model = build(shrink(default_config(family), 2, family_of(family).tiny))
        tokens = torch.randint(3, 64, TINY_BATCH, generator=torch.Generator().manual_seed(0))
        out = run_tokens(model.train(), tokens)
        out.logits.float().square().mean().backward()
    except Exception:  # a family whose default cannot be built so small: nothing is known of it
        return frozenset()
    patterns: dict[str, bool] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:  # a balance bias, which load moves
            continue
        live = p.grad is not None and bool((p.grad != 0).any())
        patterns[pattern_of(name)] = patterns.get(pattern_of(name), False) or live
    return frozenset(pattern for pattern, live in patterns.items() if not live)
