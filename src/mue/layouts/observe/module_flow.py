"""Which of a model's inputs reach each module, what was joined to make what it is given, and whether its output is cut.

One input at a time is changed: a module that is then given something else reads it. So are all parameters, at last: what is then given
the same reads no other module. Nothing is concluded from names of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mue.layouts.layout import canonical

ROUNDING = 1e-5  # relative; products of the same numbers may be summed up in another order


@dataclass(frozen=True)
class ModuleFlow:
    """What one module is given, and what becomes of its output.

    Attributes:
        reads: kinds of the model's inputs that it depends on. joined: sizes of the parts that were put side by side to make it, along
            its last axis; empty where it was not. cut: into how many parts its output is cut at once. raw: no parameter is in it.
    """

    reads: frozenset[str] = frozenset()
    joined: tuple[int, ...] = ()
    cut: int = 1
    raw: bool = False


UNWATCHED = ModuleFlow()


@torch.no_grad()
def module_flows(
    model: nn.Module, run: Callable[[Mapping[str, Any]], object], given: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, ModuleFlow]:
    """Module → its flow, for those that are called.

    Args:
        model: off its start, so that no zero hides what is read. run: calls it with keywords. given: those keywords.
        kinds: keyword → of what kind it is, for those that are changed, one at a time.
    """
    seen = _Calls()
    with _called(model, seen), seen:
        run(given)
    reads: dict[str, set[str]] = {name: set() for name in seen.given}
    for keyword, kind in kinds.items():
        other = _Calls()
        with _called(model, other):
            run({**given, keyword: _turned(given[keyword])})
        for name, before in seen.given.items():
            if _differ(before, other.given.get(name, [])):
                reads[name].add(kind)
    raw = _raw(model, seen.given, run, given)
    return {
        canonical(name): ModuleFlow(
            frozenset(reads[name]),
            seen.joined.get(_place(many[0]), ()),
            seen.cut.get(seen.made.get(name, (0, 0)), 1),
            name in raw,
        )
        for name, many in seen.given.items()
    }


def _raw(
    model: nn.Module,
    given: Mapping[str, Sequence[Tensor]],
    run: Callable[[Mapping[str, Any]], object],
    keywords: Mapping[str, Any],
) -> set[str]:
    """Modules that are given the same when every parameter is another."""
    other = _Calls()
    kept = [(p, p.clone()) for p in model.parameters()]
    try:
        for p, old in kept:
            p.copy_(old.flip(tuple(range(old.dim()))) * 1.5)
        with _called(model, other):
            run(keywords)
    finally:
        for p, old in kept:
            p.copy_(old)
    return {name for name, before in given.items() if not _differ(before, other.given.get(name, []))}


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What modules were given and made; while it is on as a mode, what is joined and cut as well."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: dict[str, list[Tensor]] = {}
        self.made: dict[str, tuple[int, int]] = {}
        self.joined: dict[tuple[int, int], tuple[int, ...]] = {}
        self.cut: dict[tuple[int, int], int] = {}
        self.alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kernel = func.overloadpacket.__name__
        if kernel == "cat" and len(args) > 1 and args[1] in (-1, out.dim() - 1):
            self.joined[_place(out)] = tuple(t.shape[-1] for t in args[0])
            self.alive.append(out)
        if kernel in ("split", "split_with_sizes", "chunk") and sum(t.shape[-1] for t in out) == args[0].shape[-1]:
            self.cut[_place(args[0])] = len(out)
            self.alive.append(args[0])
        return out


def _place(t: Tensor) -> tuple[int, int]:
    """Where a tensor lies: views of all of it are the same."""
    return t.untyped_storage().data_ptr(), t.numel()


@contextmanager
def _called(model: nn.Module, calls: _Calls) -> Iterator[None]:
    """Meanwhile every call of a module with a tensor is noted."""

    def hook(name: str) -> Callable[..., None]:
        def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if first is not None:
                calls.given.setdefault(name, []).append(first)
            if isinstance(out, Tensor):
                calls.made.setdefault(name, _place(out))
                calls.alive.append(out)

        return left

    handles = [
        m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if not list(m.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turned(value: Any) -> Any:
    """An input whose every number lies in another's place: other numbers of the same kind."""
    if isinstance(value, Mapping):
        return {k: _turned(v) for k, v in value.items()}
    return value.flip(tuple(range(value.dim())))


def _differ(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether any call was given something else; experts are given other rows, and other numbers of them."""
    if len(before) != len(now):
        return True
    return any(a.shape != b.shape or _apart(a, b) for a, b in zip(before, now, strict=True))


def _apart(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() > ROUNDING * a.abs().max()) if a.numel() else False
