"""What a fitted law is, the numbers it reads of a model and its run, and the laws by name.

@LAWS.register("mine")            # in mine.py, ours or yours
def mine() -> Law: ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mue.shapes import Block, Training, Transformer
from mue.util.registry import Registry
from mue.util.text import number

Range = tuple[float, float]
"""Smallest and largest number that a law was fitted to."""
Model = tuple[Transformer, Training | None]
"""A shape and its run, if there is one."""


class OutsideRangeError(ValueError):
    """A law was asked about a model or a run unlike those it was fitted to; the text says in what, and what the range is."""


@dataclass(frozen=True)
class Quantity:
    """A number that laws read.

    Attributes:
        meaning: in words, with its unit. of: computes it from a shape and its run. of_run: whether it needs a run.
    """

    meaning: str
    of: Callable[[Transformer, Training], float]
    of_run: bool = False


_VOCABULARY = ("embedding", "head")


def _parameters(shape: Transformer) -> int:
    return sum(t.many * t.size for t in shape.tensors() if t.trained and t.role not in _VOCABULARY)


def _active(shape: Transformer) -> int:
    return sum(min(t.used, t.many) * t.size for t in shape.tensors() if t.trained and t.role not in _VOCABULARY)


def _compute(shape: Transformer, run: Training) -> float:
    vocabulary = sum(t.used * t.size for t in shape.tensors() if t.matrix and t.role in _VOCABULARY)
    return (shape.flops_per_token - 6.0 * vocabulary) * run.tokens


def _of_experts(shape: Transformer, of: Callable[[Block], float], what: str) -> float:
    """A number of the blocks that have experts (1 where none has), which must be the same in all of them."""
    found = {of(block) for block in shape.blocks if block.experts} or {1.0}
    if len(found) > 1:
        raise OutsideRangeError(f"blocks differ in {what}, of which a law knows one")
    return found.pop()


def _activation(block: Block) -> float:
    """Experts that a token passes over all there are, shared ones on both sides (2507.17702, section 2.1)."""
    return (block.active + block.shared_experts) / (block.experts + block.shared_experts)


QUANTITIES = {
    "N": Quantity("parameters without embedding and head, all experts", lambda s, _: _parameters(s)),
    "N_a": Quantity("parameters that a token meets, without embedding and head", lambda s, _: _active(s)),
    "d": Quantity("width", lambda s, _: s.width),
    "L": Quantity("layers", lambda s, _: s.layers),
    "E": Quantity("routed experts, 1 of a dense model", lambda s, _: _of_experts(s, lambda b: b.experts, "experts")),
    "S": Quantity(
        "routed experts over active ones, 1 of a dense model",
        lambda s, _: _of_experts(s, lambda b: b.experts / b.active, "sparsity"),
    ),
    "A": Quantity(
        "active over all experts, shared ones included, 1 of a dense model",
        lambda s, _: _of_experts(s, _activation, "active experts"),
    ),
    "D": Quantity("tokens of the run", lambda _, run: run.tokens, of_run=True),
    "B": Quantity("tokens in a step", lambda _, run: run.batch, of_run=True),
    "C": Quantity("training FLOPs, without embedding and head", _compute, of_run=True),
    "R": Quantity("tokens of the run for each active parameter", lambda s, r: r.tokens / _active(s), of_run=True),
}


@dataclass(frozen=True)
class Power:
    """One number that a law gives: constant · Π quantity^exponent.

    Attributes:
        exponents: by quantity, in the order in which they are multiplied.
        constant: None where what was published does not say in which units: only ratios mean something then.
        ranges: by quantity, what the law was fitted to; also of quantities that are not in the product.
        note: whose rate it is, or what happens at that batch.
    """

    exponents: Mapping[str, float]
    constant: float | None
    ranges: Mapping[str, Range]
    note: str = ""

    @property
    def formula(self) -> str:
        """``"1.79 · N^-0.713 · D^0.307"``."""
        constant = "c" if self.constant is None else f"{self.constant:.5g}"
        return " · ".join([constant, *(f"{name}^{power:g}" for name, power in self.exponents.items())])

    def read(self, shape: Transformer, run: Training | None, symbols: Iterable[str]) -> dict[str, float]:
        """Quantities of a model and its run.

        Raises:
            ValueError: one needs the run, and there is none; blocks that differ in what it reads.
        """
        return {name: quantity(name, shape, run) for name in symbols}

    def of(self, values: Mapping[str, float]) -> float:
        """Constant (1 where there is none) times the powers of the given quantities, without regard to the range."""
        value = 1.0 if self.constant is None else self.constant
        for name, power in self.exponents.items():
            value *= values[name] ** power
        return float(value)

    def check(self, values: Mapping[str, float]) -> None:
        """Refuse what the law was not fitted to.

        Raises:
            OutsideRangeError: naming the quantity, its value and the range.
        """
        for name, (low, high) in self.ranges.items():
            # a hair of room, for the ends themselves are computed from shapes
            if not low * (1 - 1e-9) <= values[name] <= high * (1 + 1e-9):
                raise OutsideRangeError(f"{name} = {number(values[name])}, fitted for {span((low, high))}")

    def inside(self, shape: Transformer, run: Training | None) -> dict[str, float]:
        """The quantities it multiplies, of a model that it was fitted to; errors as :meth:`read` and :meth:`check` have them."""
        self.check(self.read(shape, run, self.ranges))
        return self.read(shape, run, self.exponents)

    def at(self, shape: Transformer, run: Training | None) -> float:
        """Its number for a model and its run.

        Raises:
            OutsideRangeError: outside the range, or a law without constant. ValueError: no run, where it reads one.
        """
        if self.constant is None:
            raise OutsideRangeError("the units of its constant are not published: only ratios are known")
        return self.of(self.inside(shape, run))

    def ratio(self, base: Model, target: Model) -> float:
        """Its number for the target over that for the base; constants cancel, and the range is not asked about."""
        ours, before = (self.of(self.read(*model, self.exponents)) for model in (target, base))
        return ours / before


@dataclass(frozen=True)
class Law:
    """What one team fitted.

    Attributes:
        name: as registered. title: who. fitted: the runs behind it: models, optimizer, schedule.
        sets: ``"lr"``, ``"batch"`` or ``"critical batch"`` (in tokens) → how it follows.
        source: where each constant stands, with table or equation.
    """

    name: str
    title: str
    fitted: str
    sets: Mapping[str, Power]
    source: str


LAWS: Registry[Callable[[], Law]] = Registry("fitted law", home="mue.rules.laws")


def get_law(name: str) -> Law:
    """A law by its name in :data:`LAWS`; ``ValueError`` with the nearest for any other. They are immutable, and made once."""
    return _made(LAWS.lookup(name))


@lru_cache(maxsize=64)
def _made(law: Callable[[], Law]) -> Law:
    return law()


def lr_law(name: str) -> Power:
    """The learning rate of a law.

    Raises:
        ValueError: no law of that name, or one that sets something else.
    """
    law = get_law(name)
    if "lr" not in law.sets:
        raise ValueError(f"the law {name!r} sets no learning rate but {', '.join(law.sets)}")
    return law.sets["lr"]


def quantity(name: str, shape: Transformer, run: Training | None) -> float:
    """A quantity of :data:`QUANTITIES`.

    Raises:
        ValueError: it needs the run, and there is none.
    """
    found = QUANTITIES[name]
    if run is None:
        if found.of_run:
            raise ValueError(f"needs {name}, {found.meaning}: give training (batch and steps)")
        run = Training(1, 1)  # which the others do not read
    return found.of(shape, run)


def span(ends: Range) -> str:
    """A range as people read it: ``"512 to 2048"``, ``"up to 2e+09"``, ``"2 and more"``."""
    low, high = ends
    if math.isinf(high):
        return f"{number(low)} and more"
    return f"{number(low)} to {number(high)}" if low > 0 else f"up to {number(high)}"
