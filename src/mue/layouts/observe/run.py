"""Calling a model that is known only by observation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_tokens(model: nn.Module, tokens_BT: Tensor) -> Any:
    """Call a language model on tokens, as its ``forward`` wants them: by name, or as the one argument.

    Args:
        tokens_BT: (sequences, tokens), whole numbers below the vocabulary.

    Returns:
        What the model returns. No cache of keys and values is asked for.
    """
    named = inspect.signature(model.forward).parameters
    takes = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = any(p.kind in takes for p in named.values())
    # what forwards all its arguments to another function names none of its own
    by_name = "input_ids" in named or not first
    extra = {"use_cache": False} if "use_cache" in named or (by_name and _takes_anything(named.values())) else {}
    return model(input_ids=tokens_BT, **extra) if by_name else model(tokens_BT, **extra)


def _takes_anything(parameters: Iterable[inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every parameter off its start, so that nothing is hidden behind a gain or an output of zero."""
    for p in model.parameters():
        if p.is_floating_point():
            # about the size of a weight at init: the pass stays finite, and no zero hides a use
            p.add_(torch.randn_like(p), alpha=0.02)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping as keywords, a tuple or list as arguments, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
