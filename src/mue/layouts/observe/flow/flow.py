"""What is found of a recorded forward pass: where each node's values come from, products, branches, lookups, and other uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag

from torch import Tensor

from mue.layouts.observe.flow.graph import Node


class Kind(Enum):
    """Whether a node's values depend on the tokens, else on parameters, else on neither."""

    ACTIVATION = 0
    WEIGHT = 1
    CONSTANT = 2


class Passage(IntFlag):
    """What happened between a matrix and where its values are found now."""

    LINEAR = 0
    BENT = 1  # a function that is not linear
    SOFTMAX = 2
    MIXED = 4  # contracted with another activation, as attention does
    TIMES = 8  # multiplied by another activation, element by element
    CHOSE = 16  # it only says which entries of others are taken
    TORN = 32  # halves of it met, and it is not known which


# (node of a product, first of its outputs that a view took; None: all of them)
Origin = tuple[int, int | None]
Origins = Mapping[Origin, frozenset[Passage]]


@dataclass(frozen=True)
class WeightProduct:
    """A matrix product of weights with activations.

    Attributes:
        weight, reads: the nodes of its operands. parameters: that the weight was made of. features: its outputs.
    """

    node: int
    weight: int
    reads: int
    parameters: frozenset[str]
    features: int


@dataclass(frozen=True)
class Use:
    """A parameter that met activations element by element: by which kernel, which activations, and what came out.

    ``slot``: ``gain`` or ``bias`` of a norm's kernel, ``bias`` of a product, or empty.
    """

    op: str
    weight: int
    activation: int
    result: int
    slot: str = ""


@dataclass(frozen=True)
class StreamBranch:
    """What is added to the residual stream: the node of the sum, and of what was added."""

    sum: int
    added: int


@dataclass(frozen=True)
class Lookup:
    """Rows of a parameter, picked by whole numbers."""

    weight: int
    index: int
    result: int


@dataclass
class Flow:
    """All that was found; lists are in the order of the forward pass.

    Attributes:
        origins: of each node. stream: nodes that hold the residual stream. normed: nodes that a norm was the last to change.
        contractions: node → its two operands, both activations. filters: parameters of convolutions. narrow: statistics over the
            features, one number each. outputs: origin that is a part of a product → the outputs in it, of the least view that begins there.
    """

    nodes: Sequence[Node]
    kinds: list[Kind] = field(default_factory=list)
    origins: list[Origins] = field(default_factory=list)
    stream: set[int] = field(default_factory=set)
    normed: set[int] = field(default_factory=set)
    parameters: dict[int, frozenset[str]] = field(default_factory=dict)
    products: dict[int, WeightProduct] = field(default_factory=dict)
    contractions: dict[int, tuple[int, int]] = field(default_factory=dict)
    branches: list[StreamBranch] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    filters: set[str] = field(default_factory=set)
    narrow: set[int] = field(default_factory=set)
    outputs: dict[Origin, frozenset[int]] = field(default_factory=dict)
    _frames: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # storage → first entry, step, features

    def bent(self, origin_ways: Iterable[Passage]) -> bool:
        """Whether on every way it was bent or only chose."""
        return all(way & (Passage.BENT | Passage.CHOSE) for way in origin_ways)

    def leads_to(self, ends: Iterable[int]) -> set[int]:
        """The nodes that any of ``ends`` was made of."""
        found = set(ends)
        for n in range(len(self.nodes) - 1, -1, -1):
            if n in found:
                found.update(i for _, i in self.nodes[n].inputs)
        return found

    def value(self, index: int) -> Tensor | None:
        """The whole numbers that a node holds."""
        return self.nodes[index].tensor
