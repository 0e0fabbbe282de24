"""What a user gives as functions, tried for what a call needs before anything is run."""

from __future__ import annotations

import inspect
from typing import Any

CLIP = "clip= is your own call that clips, without arguments: clip=lambda: clip_grad_norm_(model.parameters(), 1.0)"
SCHEDULER = "scheduler= is the scheduler that was built on the optimizer, a list of them, or a function of the step that sets the rates"
LOSS = "loss= is a function of model and batch that returns the scalar loss: loss=lambda model, batch: ..."


def check_calls(scheduler: Any, clip: Any, loss: Any) -> None:
    """Refuse what cannot be called as :func:`mue.check` will call it.

    Args:
        scheduler, clip, loss: as they were given; None where they were not.

    Raises:
        ValueError: with what was given, and how it should look.
    """
    for one in scheduler if isinstance(scheduler, list | tuple) else [scheduler]:
        if one is not None and (isinstance(one, type) or not hasattr(one, "step")):
            _callable_with(one, 1, SCHEDULER)
    if clip is not None:
        _callable_with(clip, 0, CLIP)
    if loss is not None:
        _callable_with(loss, 2, LOSS)


def _callable_with(given: Any, count: int, fix: str) -> None:
    if isinstance(given, type) or not callable(given):
        what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
        raise ValueError(f"{fix}; got {what}")
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # some built-in functions tell nobody what they take
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        name = getattr(given, "__name__", type(given).__name__)
        raise ValueError(f"{fix}; {name}{signature} cannot be called so: {error}") from None
