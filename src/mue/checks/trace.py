"""One forward pass seen kernel by kernel: every use of a parameter, the residual stream, and what is added to it.

No hooks: a module that is called twice, a functional call and a stacked tensor of experts are all seen, because what is
recorded is what the kernels were handed. Values are kept, so use small batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mue.layouts.layout import ParamInfo

# Kernel → positions of its two factors.
_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "_grouped_mm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
}
_COPIES = frozenset(
    {"_to_copy", "clone", "contiguous", "index_select", "index", "t_copy", "transpose_copy", "lift_fresh"}
)
_SCALED = frozenset({"_to_copy", "clone", "mul", "div", "mul_", "div_"})  # the stream again, perhaps times a number


@dataclass
class Product:
    """One product with a parameter: the other factor, as rows where it stands on the left, and the result."""

    info: ParamInfo
    given: Tensor
    out: Tensor
    transposed: bool = False


@dataclass
class Added:
    """One addition to the residual stream.

    ``before`` is the stream as it was left, ``carried`` what the branch joined, ``normed`` the output of a norm that ran before
    any of the branch's products.
    """

    before: Tensor
    carried: Tensor
    branch: Tensor
    products: list[Product]
    normed: Tensor | None = None


@dataclass
class Softmax:
    """One attention: the products with parameters since the last addition, and what the softmax saw.

    ``logits`` (…, queries, keys) where a softmax ran over them, with ``scores``, the product they came from; else ``q``,
    ``k`` and the kernel's own ``scale``.
    """

    products: list[Product]
    scores: Tensor | None = None
    logits: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    scale: float | None = None


@dataclass
class Record:
    """A whole forward pass."""

    added: list[Added] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    lookup: Tensor | None = None
    stream: Tensor | None = None
    rest: list[Product] = field(default_factory=list)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record into ``record`` while this mode is on."""

    wants_plain_operators = True  # mue.moe.experts then takes no fused kernel, whose inside cannot be seen

    def __init__(self, placed: Iterable[ParamInfo], width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._width = width
        self._parameters: dict[int, list[tuple[int, int, ParamInfo]]] = {}
        self._aliases: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []
        self._since: list[Product] = []
        self._normed: Tensor | None = None
        self._scores: Tensor | None = None  # the last product of two activations
        for p in placed:
            self._hold(p.parameter, p)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel = func.overloadpacket.__name__
        joined = self._join(kernel, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if joined is not None and isinstance(out, Tensor):
            self._add(*joined, out)
        elif isinstance(out, Tensor) and not self._carry(kernel, args, out):
            self._product(kernel, args, out)
        if not self._since:
            self._norm(args, out[0] if isinstance(out, tuple) else out)
        if kernel.startswith(("_scaled_dot_product", "_softmax")):
            self._attention(kernel, args, kwargs or {})
        return out

    # ---- parameters ---------------------------------------------------------------------------------------------

    def _hold(self, t: Tensor, p: ParamInfo) -> None:
        """Know a parameter, or a copy of it, by its memory: storage and range in it, which every view of it shares.

        Several parameters may lie in one storage (FSDP, a fused tensor), hence the range.
        """
        start = int(t.storage_offset())
        self._parameters.setdefault(_key(t), []).append((start, start + max(int(t.numel()), 1), p))
        # a freed storage's address would be given to another tensor, which would then pass for this one
        self._alive.append(t)

    def _parameter(self, t: object) -> ParamInfo | None:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return None
        for start, end, p in self._parameters.get(_key(t), []):
            if start <= t.storage_offset() < end:
                return p
        return None

    # ---- the stream ---------------------------------------------------------------------------------------------

    def _on_stream(self, t: object) -> bool:
        return isinstance(t, Tensor) and t.dim() > 0 and t.shape[-1] == self._width and _key(t) in self._aliases

    def _join(self, kernel: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """(carried, branch) where this kernel adds to the stream; taken before it runs, for it may run in place."""
        if kernel not in ("add", "add_") or len(args) < 2 or not isinstance(args[1], Tensor):
            return None
        a, b = args[0], args[1]
        if a.shape != b.shape or not (self._on_stream(a) or self._on_stream(b)):
            return None
        alpha = float(kwargs.get("alpha", 1))
        # alpha is a multiplier like any other: torch.add(x, y, alpha=c) is x + c·y
        carried, branch = (a, b * alpha) if self._on_stream(a) else (b * alpha, a)
        return (carried.clone(), branch.clone()) if kernel == "add_" else (carried, branch)

    def _add(self, carried: Tensor, branch: Tensor, out: Tensor) -> None:
        assert self.record.stream is not None
        self.record.added.append(Added(self.record.stream, carried, branch, self._since, self._normed))
        self._since, self._scores, self._normed = [], None, None
        self._move(out)

    def _move(self, stream: Tensor) -> None:
        self.record.stream = stream
        self._aliases = {_key(stream): stream}
        self.record.rest = self._since

    def _carry(self, kernel: str, args: tuple[Any, ...], out: Tensor) -> bool:
        """Follow parameters and the stream through copies; True where there is nothing more to see in this kernel."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not tensors:
            return False
        p = self._parameter(tensors[0])
        if p is not None and kernel == "embedding":
            if p.role == "embedding" and self.record.stream is None:
                self.record.lookup = out
                self._move(out)
            return True
        if p is not None and kernel in _COPIES:
            if _key(out) != _key(tensors[0]):
                self._hold(out, p)
            return True
        # a multiplier may be a number of Python or a tensor of one element
        scalar = len(tensors) == 1 or (len(tensors) == 2 and tensors[1].numel() == 1)
        if kernel in _SCALED and scalar and self._on_stream(tensors[0]) and out.shape == tensors[0].shape:
            self._aliases[_key(out)] = out
        return False

    def _norm(self, args: tuple[Any, ...], out: object) -> None:
        """What a norm's gain was applied to last: the input of a branch whose experts see only some rows of it."""
        gains = [p for t in args if (p := self._parameter(t)) is not None and p.role == "norm"]
        if gains and isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == self._width:
            self._normed = out

    # ---- products and attention ---------------------------------------------------------------------------------

    def _product(self, kernel: str, args: tuple[Any, ...], out: Tensor) -> None:
        """Keep a product with a parameter, and the last one of two activations.

        That may be q·k, if a softmax comes next.
        """
        if kernel == "baddbmm":
            self._scores = args[1] @ args[2]  # without the mask and the factor that came with them
        if kernel not in _PRODUCTS:
            return
        left, right = (args[i] for i in _PRODUCTS[kernel])
        for p, other, transposed in ((self._parameter(right), left, False), (self._parameter(left), right, True)):
            if p is not None:
                found = Product(p, other, out, transposed)
                self._since.append(found)
                self.record.products.append(found)
                return
        if kernel == "bmm":
            self._scores = out.clone()

    def _attention(self, kernel: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What a softmax saw. Routers have one as well, after a product with their own matrix: not this."""
        if kernel.startswith("_softmax"):
            scores = args[0]
            # a router's softmax has the experts last, and one row a token
            if scores.dim() >= 3 and scores.shape[-2] > 1 and not any(p.info.role == "router" for p in self._since):
                self.record.softmaxes.append(Softmax(self._since, self._scores, logits=scores))
            return
        # the unfused form of scaled_dot_product_attention: its products and its softmax were seen one by one
        if "math" in kernel:
            return
        q, k = args[0], args[1]
        scale = kwargs.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        self.record.softmaxes.append(Softmax(self._since, q=q, k=k, scale=scale))


def _key(t: Tensor) -> int:
    """What a tensor is known by: its storage, which its views share."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other storageless tensors
        return -1


def traced(placed: Iterable[ParamInfo], width: int, run: Callable[[], Any]) -> tuple[Record, Any]:
    """Watch one forward pass.

    Args:
        placed: the parameters to recognise. width: D, which tells the residual stream from other tensors.
        run: calls the model; gradients are off meanwhile.

    Returns:
        What was seen, and what ``run`` returned. Every value is kept, so the batch should be small.
    """
    with torch.no_grad(), Trace(placed, width) as trace:
        out = run()
    record: Record = trace.record
    return record, out
