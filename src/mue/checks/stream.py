"""What a trace sees of the residual stream: what it begins with, and where it is now."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mue.checks.known import Known, key_of
from mue.checks.record import Origin, Product
from mue.layouts.layout import ParamInfo

ENTERING = ("embedding", "patch_embedding")  # roles whose rows become the stream


class Stream(Known):  # type: ignore[no-untyped-call]
    """The part of a trace that follows the stream."""

    def _entered(self, t: Tensor) -> None:
        """Note by what an embedding was multiplied until something was first made of it."""
        source, factor = self._chains.get(key_of(t), (None, 1.0))
        held = self._parameter(t)
        if held is not None and held[0].role == "embedding":  # positions, added as they are
            source, factor = held
        if isinstance(source, Product) and source.info.role == "patch_embedding":
            source = source.info
        if not isinstance(source, ParamInfo) or source.role not in ENTERING or source.name in self.record.entered:
            return
        self.record.entered[source.name] = factor
        if self._order(t) >= 0:
            self.record.stream = t  # what later multiplies the stream is told from what multiplied the rows

    def _move(self, stream: Tensor) -> None:
        self.record.stream = stream
        key = key_of(stream)
        self._roots.pop(key, None)  # to the end: the latest
        self._roots[key] = stream
        self._alive.append(stream)
        self._origins[key] = Origin(stream=True)
        self._scores = None

    def _patched(self, kernel: str, args: tuple[Any, ...], out: Tensor) -> bool:
        """Patches that a filter reads, one for each step of its own size (``diffusers``): its result becomes the stream."""
        held = self._parameter(args[1]) if kernel == "convolution" else None
        if held is None or held[0].role != "patch_embedding" or self.record.stream is not None:
            return False
        self._move(out)
        self._chains[key_of(out)] = held
        return True

    def _of_patches(self, t: Tensor) -> bool:
        """Whether a tensor is what a filter made of patches, but for a factor: there the width is not its last axis."""
        source, _ = self._chains.get(key_of(t), (None, 1.0))
        return isinstance(source, ParamInfo) and source.role == "patch_embedding"

    def _looked_up(self, p: ParamInfo, factor: float, out: Tensor) -> None:
        if p.role != "embedding" or not self._wide(out):
            return
        self._chains[key_of(out)] = p, factor
        self.record.lookup = out if self.record.lookup is None else self.record.lookup
        if self.record.stream is None:
            self._move(out)
        else:  # positions: the stream only once they are added
            self._roots = {key_of(out): out, **self._roots}
            self._alive.append(out)
