"""What :mod:`mue.checks.trace` keeps of one forward pass: products, norms, sums, softmaxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from mue.layouts.layout import ParamInfo
from mue.rules.roles import ROLES


@dataclass(frozen=True)
class Origin:
    """What a tensor was made of, back to the nearest products with a parameter.

    Attributes:
        products: their numbers in the record. stream: the residual stream is in it with no product in between.
    """

    products: frozenset[int] = frozenset()
    stream: bool = False

    @staticmethod
    def union(many: Iterable[Origin | None]) -> Origin | None:
        """Of everything that a kernel was given; None where nothing is known of any."""
        known = [o for o in many if o is not None]
        if len(known) < 2:
            return known[0] if known else None
        return Origin(frozenset().union(*(o.products for o in known)), any(o.stream for o in known))


@dataclass
class Normed:
    """The output of one norm: what it was given, and the gain and bias that followed, in their order.

    ``scale`` and ``shift``: of adaLN (2212.09748), by what it was then multiplied and what was added, made of a modulation.
    """

    given: Tensor
    out: Tensor
    vectors: list[ParamInfo]
    scale: Tensor | None = None
    shift: Tensor | None = None


@dataclass
class Product:
    """One product with a parameter: the other factor, as rows where it stands on the left, and the result.

    Attributes:
        factor: what the parameter was multiplied by on its way. normed: the norm that ran last.
        given_is: what the other factor is, but for a factor, where that is known.
    """

    info: ParamInfo
    given: Tensor
    out: Tensor
    transposed: bool = False
    factor: float = 1.0
    normed: Normed | None = None
    given_is: tuple[object, float] | None = None


@dataclass(frozen=True)
class Term:
    """One part of what is added to the stream.

    Attributes:
        value: as it is added; of one behind a gate, as it would be added if that were 1. origin: the products it was made of.
            normed: the norm that ended it, and ``factor``, by what its output was multiplied. gate: of adaLN-zero, by what it was
            multiplied token by token.
    """

    value: Tensor
    origin: Origin
    normed: Normed | None = None
    factor: float = 1.0
    gate: Tensor | None = None

    def times(self, factor: float) -> Term:
        return replace(self, value=self.value * factor, factor=self.factor * factor)


@dataclass
class Added:
    """One addition to the residual stream.

    Attributes:
        before: the stream as it was left. carried: what the branch joined. term: the branch.
        upto: how many products had been seen.
    """

    before: Tensor
    carried: Tensor
    term: Term
    upto: int


@dataclass
class Scores:
    """A product of two activations: q·k, where a softmax comes next."""

    out: Tensor


@dataclass
class Softmax:
    """One attention: the products that its queries and keys came from, and what the softmax saw.

    ``logits`` (…, queries, keys) where a softmax ran over them, with ``scores``, the product they came from, and ``scale``,
    by what that was multiplied, if nothing but numbers, masks and positions came between; else ``q``, ``k`` and the
    kernel's own ``scale``. ``later``: the first query sees the last key, for no mask hides it.
    """

    products: list[Product]
    scores: Tensor | None = None
    logits: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    scale: float | None = None
    later: bool = False


@dataclass
class Record:
    """A whole forward pass.

    Attributes:
        entered: name of an embedding, of tokens or of patches → by what its rows were multiplied on their way into the stream.
        losses, returned: the product that a loss, or the model's caller, was given, and by what it was multiplied.
        entropies: of each cross-entropy: its mean, and over how many targets.
        lookup: the first embedding's rows. stream: as it was left last.
        read: the tokens that the embedding looked up. targets: of each cross-entropy.
        modulated: of each use of a modulation: its name, which of its vectors of width d, and as what.
        used: names of the parameters that some kernel was handed.
        vectors: name of a vector → whether a kernel took it as a ``"gain"`` or as a ``"bias"``.
    """

    added: list[Added] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    norms: list[Normed] = field(default_factory=list)
    entered: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[Product, float]] = field(default_factory=list)
    returned: list[tuple[Product, float]] = field(default_factory=list)
    entropies: list[tuple[float, int]] = field(default_factory=list)
    lookup: Tensor | None = None
    stream: Tensor | None = None
    read: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    modulated: list[tuple[str, int, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    vectors: dict[str, str] = field(default_factory=dict)

    def ends(self, origin: Origin) -> list[Product]:
        """The products that a branch was made of directly."""
        return [self.products[i] for i in sorted(origin.products)]

    def kind(self, origin: Origin) -> str:
        """``"attention"`` or ``"feed-forward"`` by what a branch ends in, o or a down projection; "" for neither, or both."""
        roles = {p.info.role for p in self.ends(origin)}
        attention, forward = "attention_o" in roles, any(ROLES[role].part == "down" for role in roles)
        return "" if attention == forward else "attention" if attention else "feed-forward"
