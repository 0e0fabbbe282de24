"""Watch a tiny forward pass and read, for every parameter, which of its axes is summed over, and how it is used.

Every kernel that runs is seen with its operands. A view of a parameter shares its storage, so the strides of the operand
say which of the parameter's axes it carries; copies (casts, transposes made contiguous, gathers of experts) are followed.
Nothing is concluded from names or from the order of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Kernel → for each operand, the dimensions it is summed over. Negative ones count from the end.
SUMS: dict[str, dict[int, tuple[int, ...]]] = {
    "mm": {0: (1,), 1: (0,)},
    "bmm": {0: (2,), 1: (1,)},
    "addmm": {1: (1,), 2: (0,)},
    "baddbmm": {1: (2,), 2: (1,)},
    "mv": {0: (1,), 1: (0,)},
    "addmv": {1: (1,), 2: (0,)},
    "dot": {0: (0,), 1: (0,)},
    "_grouped_mm": {0: (-1,), 1: (-2,)},
    "linear": {0: (-1,), 1: (-1,)},
    # of a filter over images the last two; one over a line has no axis 3
    "convolution": {1: (1, 2, 3)},
    "_convolution": {1: (1, 2, 3)},
    "mkldnn_convolution": {1: (1, 2, 3)},
}
_SCORES = {"sigmoid": "sigmoid", "sigmoid_": "sigmoid", "_softmax": "softmax", "softmax": "softmax"}
_LOOKUPS = {"embedding": 0}
# Results that are their input again, perhaps cast, moved or with entries picked along one axis.
_COPIES = ("clone", "_to_copy", "contiguous", "index_select", "lift_fresh", "lift_fresh_copy", "slice_copy", "flip")


@dataclass
class ParamUse:
    """How one parameter was used.

    Attributes:
        summed: axes of the parameter that were summed over, one set for each distinct way. looked_up: rows were picked
            by token. elementwise: it met the activations element by element. order: number of the kernel that used it
            first.
    """

    summed: set[tuple[int, ...]] = field(default_factory=set)
    looked_up: bool = False
    elementwise: bool = False
    convolved: bool = False
    order: int = -1

    @property
    def seen(self) -> bool:
        return self.order >= 0


@dataclass(frozen=True)
class _Origin:
    """A parameter inside a storage: for each of its axes the stride and the length with which it lies there."""

    name: str
    axes: tuple[tuple[int, int, int], ...]  # (axis, stride, size)

    def axis(self, stride: int) -> int | None:
        # a view steps along an axis by a multiple of its stride that stays inside it; of several the largest stride is
        # it
        fits = [(s, axis) for axis, s, n in self.axes if s <= stride < s * n]
        return max(fits)[1] if fits else None


class UseRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record into ``uses`` how the named parameters are used while this mode is on."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[str, ParamUse] = {}
        self.scores: set[tuple[str, int]] = set()  # (sigmoid or softmax, length of the last axis) that ran
        self._origins: dict[int, list[_Origin]] = {}
        self._alive: list[Tensor] = []  # followed storages must not be freed and their addresses used again
        self._clock = 0
        for name, parameter in parameters:
            self.uses[name] = ParamUse()
            self._follow(parameter, [(name, list(range(parameter.dim())))])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._clock += 1
        tensors = list(tensors_in(args))
        kernel = func.overloadpacket.__name__
        if kernel in _SCORES and isinstance(out, Tensor) and out.dim():
            self.scores.add((_SCORES[kernel], out.shape[-1]))
        if any(self._known(t) for _, t in tensors):
            self._record(kernel, args, tensors, out)
        return out

    def _known(self, t: Tensor) -> list[_Origin]:
        try:
            return self._origins.get(t.untyped_storage().data_ptr(), [])
        except (RuntimeError, NotImplementedError):  # sparse and other storageless tensors
            return []

    def _follow(self, t: Tensor, origins: Sequence[tuple[str, Sequence[int | None]]]) -> None:
        """Remember that ``t`` holds parameters, with the parameter's axis of each dimension of ``t``."""
        if t.numel() == 0:
            return
        held = self._origins.setdefault(t.untyped_storage().data_ptr(), [])
        self._alive.append(t)
        for name, axes in origins:
            # an axis of length 1 may have any stride, which says nothing
            lies = tuple(
                (axis, t.stride(d), t.shape[d]) for d, axis in enumerate(axes) if axis is not None and t.shape[d] > 1
            )
            origin = _Origin(name, lies)
            if origin not in held:
                held.append(origin)

    def _carried(self, t: Tensor) -> list[tuple[str, list[int | None]]]:
        """(parameter, its axis along each dimension of ``t``)."""
        return [
            (o.name, [o.axis(s) if n > 1 else None for s, n in zip(t.stride(), t.shape, strict=True)])
            for o in self._known(t)
        ]

    def _record(self, kernel: str, args: tuple[Any, ...], tensors: list[tuple[int, Tensor]], out: Any) -> None:
        """Note for every parameter among the operands which of its axes this kernel sums over.

        Views and copies are followed.
        """
        outs = [t for _, t in tensors_in((out,))]
        if any(self._shares(o, t) for o in outs for _, t in tensors) and not kernel.endswith("_"):
            return  # a view: the storage is known already
        if self._copied(kernel, args, tensors, outs):
            return
        for position, t in tensors:
            for name, axes in self._carried(t):
                use = self.uses[name]
                use.order = self._clock if use.order < 0 else use.order
                if kernel in _LOOKUPS and position == _LOOKUPS[kernel]:
                    use.looked_up = True
                elif kernel in SUMS and position in SUMS[kernel]:
                    dims = [d % t.dim() for d in SUMS[kernel][position] if d < t.dim()]
                    found = tuple(sorted({a for d in dims if (a := axes[d]) is not None}))
                    use.summed.add(found)
                    use.convolved |= "convolution" in kernel
                else:
                    use.elementwise = True

    def _shares(self, a: Tensor, b: Tensor) -> bool:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

    def _copied(
        self, kernel: str, args: tuple[Any, ...], tensors: list[tuple[int, Tensor]], outs: list[Tensor]
    ) -> bool:
        """Follow results that are parameters still; False for a real use."""
        if kernel == "copy_":
            self._follow(tensors[0][1], self._carried(tensors[1][1]) if len(tensors) > 1 else [])
            return True
        mine = [t for _, t in tensors if self._known(t)]
        if kernel in ("cat", "stack"):
            if len(mine) < len(tensors):
                return False  # joined with activations (attention sinks)
            shift = int(kernel == "stack")
            for _, t in tensors:
                self._follow(outs[0], [(n, [None] * shift + axes) for n, axes in self._carried(t)])
            return True
        if kernel in ("index", "gather", "index_select", "embedding") and kernel != "embedding" and outs:
            source = tensors[0][1]
            extra = outs[0].dim() - source.dim()
            if extra < 0 or not self._known(source):
                return False
            self._follow(outs[0], [(n, [axes[0]] * extra + axes) for n, axes in self._carried(source)])
            return True
        alone = all(self._known(t) or not t.dim() for _, t in tensors)
        if outs and alone and all(t.shape == outs[0].shape or t.numel() == 1 for t in mine) and kernel not in SUMS:
            # A function of parameters alone (a cast, 1 + gain, -exp(A_log)): still that parameter.
            for t in mine:
                if t.shape == outs[0].shape:
                    self._follow(outs[0], self._carried(t))
            return True
        if kernel in _COPIES and outs:
            self._follow(outs[0], self._carried(tensors[0][1]))
            return True
        return False


def tensors_in(args: Iterable[Any]) -> Iterator[tuple[int, Tensor]]:
    """(position of the argument, tensor) for every tensor among an operator's arguments, lists opened."""
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            yield position, arg
        elif isinstance(arg, list | tuple):
            for item in arg:
                if isinstance(item, Tensor):
                    yield position, item


def param_use(
    model: nn.Module, run: Callable[[], object], scores: set[tuple[str, int]] | None = None
) -> dict[str, ParamUse]:
    """Call ``run`` (a forward pass of ``model``) without gradients and return how each of its parameters was used.

    A parameter that the pass did not reach, but whose module is a plain torch layer, is shown that layer alone.
    """
    named = list(model.named_parameters())
    with torch.no_grad(), UseRecorder(named) as seen:
        run()
    for prefix, module in model.named_modules():
        own = [(f"{prefix}.{n}" if prefix else n, p) for n, p in module.named_parameters(recurse=False)]
        missed = [(n, p) for n, p in own if not seen.uses.get(n, ParamUse(order=0)).seen]
        if missed and type(module) in (nn.Linear, nn.Embedding):
            with torch.no_grad(), UseRecorder(missed) as alone:
                module(
                    torch.zeros(3, dtype=torch.long)
                    if isinstance(module, nn.Embedding)
                    else torch.randn(3, module.in_features)
                )
            seen.uses.update(alone.uses)
    if scores is not None:
        scores |= seen.scores
    uses: dict[str, ParamUse] = seen.uses
    return uses
