"""What a router hands its experts: how many per token, weights that sum to one or not, read off a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gates:
    """The weights of one layer's active experts, over the tokens of a tiny forward pass.

    Attributes:
        active: experts per token. total: mean of Σw. spread: largest |Σw - total|. square: mean of Σw².
    """

    active: int
    total: float
    spread: float
    square: float

    @property
    def normalised(self) -> bool:
        """Whether Σw is one number for all tokens (1, or the model's own route scale)."""
        # float32 sums agree to 1e-6; those of weights that are not renormalised differ from token to token
        return self.spread <= 1e-4 * max(abs(self.total), 1e-9)


class _Enough(Exception):  # noqa: N818 - no error: the forward pass has shown what it was run for
    pass


@contextmanager
def record_gates(model: nn.Module, into: MutableMapping[str, Gates], only_first: bool = False) -> Iterator[None]:
    """While active, fill ``into`` with the gates of every module that is handed expert indices and weights.

    ``only_first``: leave the block as soon as one router was seen.
    """

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = _gates([*args, *kwargs.values()])
            if found is not None:
                into.setdefault(name, found)
                if only_first:
                    raise _Enough

        return seen

    handles = [
        m.register_forward_pre_hook(hook(n), with_kwargs=True)
        for n, m in model.named_modules()
        if "expert" in n.lower()
    ]
    try:
        with suppress(_Enough):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scaled_gates(model: nn.Module, factor: float) -> Iterator[set[str]]:
    """While active, every module that is handed expert indices and weights is handed ``factor`` times those weights.

    Returns:
        As the context's value, the names of the modules that were handed any so far.
    """
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = _weights([*args, *kwargs.values()])
            # one inside another is handed what that one was, scaled already
            if found is None or any(name.startswith(f"{outer}.") for outer in seen):
                return None
            seen.add(name)
            new = found[1] * factor
            changed = {key: new if value is found[1] else value for key, value in kwargs.items()}
            return tuple(new if value is found[1] else value for value in args), changed

        return scale

    handles = [
        m.register_forward_pre_hook(hook(n), with_kwargs=True)
        for n, m in model.named_modules()
        if "expert" in n.lower()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _gates(args: list[Any]) -> Gates | None:
    """The gates among a module's arguments."""
    found = _weights(args)
    if found is None:
        return None
    index, weights = found
    picked = weights if weights.shape[1] == index.shape[1] else weights.gather(1, index.long())
    total = picked.detach().double().sum(1)
    mean = float(total.mean())
    return Gates(index.shape[1], mean, float((total - mean).abs().max()), float((picked.double() ** 2).sum(1).mean()))


def _weights(args: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Among a module's arguments a table of expert indices, and beside it weights of the same tokens.

    Weights are those of the chosen experts (as wide as the indices), or of all of them.
    """
    indices = [a for a in args if isinstance(a, Tensor) and a.dtype in (torch.int64, torch.int32) and a.dim() == 2]
    if not indices:
        return None
    index = indices[0]
    for w in args:
        if isinstance(w, Tensor) and w.is_floating_point() and w.dim() == 2 and w.shape[0] == index.shape[0]:
            if w.shape[1] == index.shape[1]:
                return index, w
            # of all experts, zero or unused elsewhere; not the hidden states, which come first, are signed, and may be wider
            # than any number of experts
            if w.shape[1] > int(index.max()) and w.shape[1] < 4096 and bool((w >= 0).all()) and w is not args[0]:
                return index, w
    return None
