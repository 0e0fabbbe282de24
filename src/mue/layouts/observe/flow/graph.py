"""Record one forward pass as a graph: every kernel that ran, and which results of others it read.

Where a tensor's values come from is followed by object; what is written in place is a new node of every view that shares its
storage. Nothing is concluded here (:mod:`mue.layouts.observe.flow.follow` reads the graph).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mue.layouts.layout import canonical
from mue.layouts.observe.param_use import tensors_in


@dataclass(frozen=True)
class Node:
    """One result of one kernel.

    Attributes:
        op: the kernel's name without what says that it works in place; ``parameter``, ``input`` and ``constant`` are given.
        inputs: (position among the arguments, node) of every tensor that it read.
        floating: its entries are no whole numbers. storage, offset, strides, contiguous: where its entries lie. args: its arguments; tensors are None in it.
        name: of a parameter. output: which of the kernel's results it is.
        tensor: the values, of whole numbers only.
    """

    op: str
    inputs: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    floating: bool
    storage: int
    offset: int
    strides: tuple[int, ...]
    contiguous: bool
    args: tuple[Any, ...] = ()
    name: str = ""
    output: int = 0
    tensor: Tensor | None = field(default=None, compare=False)


class GraphRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fill ``nodes`` while this mode is on.

    Args:
        parameters: by name. given: what depends on the tokens from the start.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self._node_of: dict[int, int] = {}  # id of a tensor → its node now
        self._sharing: dict[int, list[Tensor]] = {}  # storage → tensors that lie in it; this keeps all of them alive
        for name, parameter in parameters:
            self._add(parameter, "parameter", (), name=name)
        for tensor in given:
            self._add(tensor, "input", ())

    def node_of(self, tensor: Tensor) -> int:
        """The node whose values a tensor has now."""
        found = self._node_of.get(id(tensor))
        if found is not None:
            return found
        sharing = self._sharing.get(_storage(tensor), [])
        if sharing:  # another object for a storage that is known
            last = self._node_of[id(sharing[-1])]
            return self._add(tensor, "alias", ((0, last),))
        return self._add(tensor, "constant", ())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = tuple((position, self.node_of(t)) for position, t in tensors_in((*args, *(kwargs or {}).values())))
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        if op.endswith("_like") or op.startswith("new_"):
            inputs = ()  # of the size of something, with nothing of its values
        written = [
            args[i]
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write and i < len(args) and isinstance(args[i], Tensor)
        ]
        plain = tuple(None if isinstance(a, Tensor) else a for a in args)
        name = op.rstrip("_") if written else op
        fresh = [t for _, t in tensors_in((out,)) if not any(t is w for w in written)]
        for number, t in enumerate(fresh):
            self._add(t, name, inputs, plain, output=number)
        for t in written:
            self._write(t, name, inputs, plain)
        return out

    def _write(self, t: Tensor, op: str, inputs: tuple[tuple[int, int], ...], args: tuple[Any, ...]) -> None:
        """A tensor has new values, and so has whatever shares its storage."""
        new = self._add(t, op, inputs, args)
        for other in list(self._sharing.get(_storage(t), [])):
            if other is not t:
                old = self._node_of[id(other)]
                self._add(other, "overwritten", ((0, old), (1, new)))

    def _add(
        self,
        t: Tensor,
        op: str,
        inputs: tuple[tuple[int, int], ...],
        args: tuple[Any, ...] = (),
        name: str = "",
        output: int = 0,
    ) -> int:
        known = id(t) in self._node_of
        number = t.is_floating_point() or t.is_complex()
        values = None if number else t
        where = (_storage(t), int(t.storage_offset()), t.stride(), t.is_contiguous())
        self.nodes.append(Node(op, inputs, tuple(t.shape), number, *where, args, name, output, values))
        self._node_of[id(t)] = len(self.nodes) - 1
        if not known:
            self._sharing.setdefault(where[0], []).append(t)
        return len(self.nodes) - 1


def _storage(t: Tensor) -> int:
    # what has no entries has no address: the object stands for it
    return t.untyped_storage().data_ptr() or id(t)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """While active, attention is products and a softmax, not one kernel that hides them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def given_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, or of what a model returns, whatever holds them."""
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in given_tensors(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in given_tensors(value)]
    if is_dataclass(batch):
        return given_tensors(vars(batch))
    return [batch] if isinstance(batch, Tensor) else []


def record_graph(
    model: nn.Module, run: Callable[[], object], given: Iterable[Tensor]
) -> tuple[list[Node], frozenset[int]]:
    """The nodes of one forward pass, in the order in which they were made, and those that the model returned.

    Args:
        model: off its start. run: its forward pass. given: the tensors that ``run`` hands it.
    """
    named = [(canonical(n), p) for n, p in model.named_parameters()]
    with torch.no_grad(), plain_kernels(), GraphRecorder(named, given) as seen:
        out = run()
        nodes: list[Node] = seen.nodes
        ends = frozenset(seen.node_of(t) for t in given_tensors(out))
    return nodes, ends
