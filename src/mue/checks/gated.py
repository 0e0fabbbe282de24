"""What a trace sees of adaLN-zero (2212.09748): norms that are scaled and shifted, and branches behind a gate, by a modulation's product.

At init gates are 0, so that what joins the stream says nothing of its branch: kept is the branch before its gate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mue.checks.known import TIMES, key_of
from mue.checks.record import Normed, Product
from mue.checks.stream import Stream
from mue.rules.roles import ROLES

_ADDCMUL = ("addcmul", "addcmul_")
_ADD = ("add", "add_")


class Gated(Stream):  # type: ignore[no-untyped-call]
    """The part of a trace that knows modulations."""

    def _modulates(self, t: object) -> bool:
        """Whether a tensor is made of a modulation's product alone: a shift, a scale (with 1 added or not) or a gate."""
        origin = self._origins.get(key_of(t)) if isinstance(t, Tensor) else None
        if origin is None or origin.stream or not origin.products:
            return False
        return all(ROLES[self.record.products[i].info.role].kind == "modulation" for i in origin.products)

    def _behind_gate(
        self, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, bool] | None:
        """(carried, gated branch, True) of x + value · gate · branch in one kernel, where x is the stream."""
        if kernel not in _ADDCMUL or not self._wide(args[0]) or self._order(args[0]) < 0:
            return None
        for gate, branch in (args[1:3], args[2:0:-1]):
            if self._modulates(gate) and not self._modulates(branch):
                both = gate * branch * kwargs.get("value", 1)
                self._alive.append(both)
                self._gate(both, gate, branch, float(kwargs.get("value", 1)))
                carried = self._times(args[0], 1.0) if kernel.endswith("_") else args[0]
                return carried, both, True
        return None

    def _use(self, t: Tensor, how: str) -> None:
        """Note which vector of which modulation is used, and as what; of one that cannot be told, nothing."""
        origin = self._origins[key_of(t)]
        products = [self.record.products[i] for i in origin.products]
        if len(products) == 1:
            self.record.modulated.append((products[0].info.name, self._place(t), how))

    def _place(self, t: Tensor) -> int:
        """Which vector of width d of a modulation's product this is."""
        return self._places.get(key_of(t), t.storage_offset() // self._width)

    def _gate(self, out: Tensor, gate: Tensor, branch: Tensor, factor: float) -> None:
        """Know ``out`` as factor · gate · branch; what the gate was multiplied by is no part of it."""
        self._use(gate, "gate")
        source, own = self._chains.get(key_of(gate), (None, 1.0))
        self._gated[key_of(out)] = gate, branch, factor * (own if isinstance(source, Product) else 1.0)
        if (origin := self._origins.get(key_of(branch))) is not None:
            self._origins[key_of(out)] = origin

    def _modulated(self, kernel: str, args: tuple[Any, ...], out: Tensor) -> bool:
        """A norm's output scaled and shifted, in one kernel or in two; or a branch times its gate."""
        if kernel in _ADDCMUL and self._modulates(args[0]):
            pairs = [(args[1], args[2]), (args[2], args[1])]
            found = next(((s, n) for s, n in pairs if self._modulates(s) and self._norm_of(n) is not None), None)
            return found is not None and self._rescaled(found[1], out, scale=found[0], shift=args[0])
        if kernel not in (*TIMES, *_ADD) or len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
            if kernel in (*TIMES, *_ADD) and args and self._modulates(args[0]):
                self._places[key_of(out)] = self._place(args[0])
            return False
        for mine, other in ((args[0], args[1]), (args[1], args[0])):
            if not self._modulates(mine) or self._modulates(other) or not self._wide(other):
                continue
            if kernel in _ADD:
                return self._norm_of(other) is not None and self._rescaled(other, out, shift=mine)
            if self._norm_of(other) is not None:
                return self._rescaled(other, out, scale=mine)
            self._gate(out, mine, other, 1.0)
            return True
        return False

    def _norm_of(self, t: object) -> Normed | None:
        source = self._chains.get(key_of(t), (None, 1.0))[0] if isinstance(t, Tensor) else None
        return source if isinstance(source, Normed) else None

    def _rescaled(self, n: Tensor, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> bool:
        norm, factor = self._norm_of(n), self._chains[key_of(n)][1]
        assert norm is not None
        for t, how in ((scale, "scale"), (shift, "shift")):
            if t is not None:
                self._use(t, how)
        made = Normed(norm.given, out, norm.vectors, norm.scale if scale is None else scale, shift)
        self._chains[key_of(out)] = made, factor
        self._keep(made, "given", "out")
        self.record.norms.append(made)
        self._last = made
        return True
