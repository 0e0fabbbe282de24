"""What a trace knows of the tensors of one forward pass: by their storage, which views share, until something else lies there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mue.checks.record import Normed, Origin, Record, Scores, Term
from mue.layouts.layout import ParamInfo

TIMES = frozenset({"mul", "mul_", "div", "div_"})
# What only looks at a tensor in another way; a detached one may be used, and gets no gradient.
VIEWS = frozenset(
    {"view", "t", "transpose", "detach", "alias", "slice", "select", "split", "permute", "unsqueeze", "expand"}
)


class Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The state of a trace.

    What is known of a tensor lasts until a kernel returns a new one at its address.
    """

    def __init__(self, placed: Iterable[ParamInfo], width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._width = width
        self._parameters: dict[int, list[tuple[int, int, ParamInfo, float]]] = {}
        self._alive: list[Tensor] = []
        self._origins: dict[int, Origin] = {}
        self._roots: dict[int, Tensor] = {}  # the stream, as it is and as it was
        self._sums: dict[int, list[Term]] = {}  # of an attention and a feed-forward that have not met the stream yet
        self._chains: dict[int, tuple[Any, float]] = {}  # what a tensor is, but for a factor
        self._gated: dict[int, tuple[Tensor, Tensor, float]] = {}  # a gate times a branch → both, and by what else
        self._places: dict[int, int] = {}  # of 1 + scale, which of a modulation's vectors the scale is
        self._rows: dict[int, Tensor] = {}  # a number for each row → what it was reduced from
        self._squared: Tensor | None = None  # what was squared last: the input of a norm, if a mean comes next
        self._kept: dict[int, list[tuple[Any, str]]] = {}  # recorded values, by storage
        self._last: Normed | None = None
        self._scores: Scores | None = None  # the last product of two activations
        for p in placed:
            self._hold(p.parameter, p, 1.0)

    def _hold(self, t: Tensor, p: ParamInfo, factor: float) -> None:
        """Know a parameter, or a copy of it times ``factor``, by its memory: storage and range in it, which views share.

        Several parameters may lie in one storage (FSDP, a fused tensor), hence the range.
        """
        start = int(t.storage_offset())
        self._parameters.setdefault(key_of(t), []).append((start, start + max(int(t.numel()), 1), p, factor))
        # a freed storage's address would be given to another tensor, which would then pass for this one
        self._alive.append(t)

    # Kernel → where its gain and its bias stand.
    _VECTORS: Mapping[str, tuple[int | None, int | None]] = {
        "addmm": (None, 0),
        "linear": (None, 2),
        "native_layer_norm": (2, 3),
        "_fused_rms_norm": (2, None),
    }

    def _handed(self, kernel: str, args: tuple[Any, ...], given: Iterable[Tensor]) -> None:
        """Note which parameters a kernel uses, and which of them it takes for a gain or a bias."""
        for t in given:
            if (held := self._parameter(t)) is not None and kernel not in VIEWS:
                self.record.used.add(held[0].name)
        if (
            kernel == "embedding"
            and (held := self._parameter(args[0])) is not None
            and held[0].layout.role == "embedding"
        ):
            self.record.read.append(args[1])
        for what, place in zip(("gain", "bias"), self._VECTORS.get(kernel, ()), strict=False):
            if place is not None and place < len(args) and (held := self._parameter(args[place])) is not None:
                self.record.vectors.setdefault(held[0].name, what)

    def _parameter(self, t: object) -> tuple[ParamInfo, float] | None:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return None
        for start, end, p, factor in self._parameters.get(key_of(t), []):
            if start <= t.storage_offset() < end:
                return p, factor
        return None

    def _forget(self, kernel: str, t: Tensor, given: list[Tensor], origin: Origin | None) -> None:
        """What was known of a result's memory is over, unless it is an operand's: then it is a view, or was changed."""
        key = key_of(t)
        shared = any(key_of(g) == key for g in given)
        if not shared:
            for known in (
                self._origins,
                self._roots,
                self._sums,
                self._chains,
                self._gated,
                self._places,
                self._rows,
                self._kept,
            ):
                known.pop(key, None)
        if origin is not None and (t.is_floating_point() or t.is_complex()) and (not shared or kernel.endswith("_")):
            self._origins[key] = origin
        if shared and kernel.endswith("_"):
            self._sums.pop(key, None)
            self._chains.pop(key, None)

    def _keep(self, held: Any, *names: str) -> None:
        for name in names:
            self._kept.setdefault(key_of(getattr(held, name)), []).append((held, name))

    def _save(self, kernel: str, args: tuple[Any, ...]) -> None:
        """Copies of recorded values that a kernel is about to overwrite."""
        if not kernel.endswith("_") or not args or not isinstance(args[0], Tensor):
            return
        key = key_of(args[0])
        for held, name in self._kept.pop(key, []):
            setattr(held, name, getattr(held, name).clone())
        if self.record.stream is not None and key_of(self.record.stream) == key:
            self.record.stream = self.record.stream.clone()

    def _wide(self, t: object) -> bool:
        return isinstance(t, Tensor) and t.dim() > 0 and t.shape[-1] == self._width and t.is_floating_point()

    def _times(self, t: Tensor, factor: float) -> Tensor:
        """A copy, times a number, of which the same is known."""
        new, old = t * factor, key_of(t)
        self._alive.append(new)
        key = key_of(new)
        for known in (self._origins, self._parameters):
            if old in known:
                known[key] = known[old]  # type: ignore[assignment]
        if old in self._roots:
            self._roots[key] = new
        if old in self._sums:
            self._sums[key] = [term.times(factor) for term in self._sums[old]]
        if old in self._chains:
            self._chains[key] = self._chains[old][0], self._chains[old][1] * factor
        if old in self._gated:
            self._gated[key] = *self._gated[old][:2], self._gated[old][2] * factor
        return new

    def _order(self, t: Tensor) -> int:
        """How late a state of the stream this is, -1 for anything else."""
        return list(self._roots).index(key_of(t)) if key_of(t) in self._roots else -1


def factor_of(kernel: str, args: tuple[Any, ...]) -> float | None:
    """The number a kernel multiplies its one larger operand by: one of Python, or a tensor of one element."""
    if kernel not in TIMES or len(args) < 2:
        return None
    a, b = args[0], args[1]
    if isinstance(b, Tensor) and isinstance(a, Tensor) and b.numel() > 1 and a.numel() == 1:
        a, b = (b, a) if kernel.startswith("mul") else (None, b)
    if not isinstance(a, Tensor) or (isinstance(b, Tensor) and b.numel() != 1):
        return None
    number = float(b)
    return number if kernel.startswith("mul") else 1 / number if number else None


def seen_ahead(logits: Tensor) -> bool:
    """Whether the first query sees the last key in masked logits (…, queries, keys) of as many of both; True is to be seen."""
    if logits.dim() < 2 or logits.shape[-2] != logits.shape[-1] or logits.shape[-1] < 2:
        return False
    last = logits[..., 0, -1]
    return bool(last.any() if last.dtype == torch.bool else (last > -1e4).any())


def unmasked(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a fused kernel of attention was called so that tokens see later ones."""
    known = func._schema.arguments
    named = {
        **{a.name: a.default_value for a in known},
        **dict(zip((a.name for a in known), args, strict=False)),
        **kwargs,
    }
    mask = next((named[key] for key in ("attn_mask", "attn_bias") if isinstance(named.get(key), Tensor)), None)
    return seen_ahead(mask) if mask is not None else named.get("is_causal") is False


def broadcasts(a: Tensor, b: Tensor) -> bool:
    """Whether the sum of two tensors is as large as one of them."""
    dims = max(a.dim(), b.dim())
    pairs = [*zip(*((1,) * (dims - t.dim()) + tuple(t.shape) for t in (a, b)), strict=True)]
    fits = all(m == n or 1 in (m, n) for m, n in pairs)
    return fits and prod(max(pair) for pair in pairs) in (a.numel(), b.numel())


def tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor among the arguments, lists opened."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))


def key_of(t: Tensor) -> int:
    """What a tensor is known by: its storage, which its views share."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other storageless tensors
        return -1


def returned(out: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned: itself, those of a mapping, a tuple or a dataclass, however deep."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from returned(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from returned(value)
    elif hasattr(out, "__dict__"):
        yield from (v for v in vars(out).values() if isinstance(v, Tensor))
