"""What every hand-written operator needs, eagerly and under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """Mark a function whose result torch.compile may keep: called once when it traces, with no graph break.

    This is what torch.compiler.assume_constant_result does; but that imports the compiler, two seconds for every program
    that never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def thread_count() -> int:
    """torch.get_num_threads(); torch.compile keeps the number that it finds when it traces."""
    return torch.get_num_threads()
