"""What is proposed for one parameter, from the flow of values alone; names are asked only for what is then marked for a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from mue.layouts.layout import BLOCKS, UNKNOWN, pattern_of
from mue.layouts.observe.decide import Facts, decide
from mue.layouts.observe.flow.flow import Flow, Origin, Passage, Use, WeightProduct
from mue.layouts.observe.flow.fused_rows import order_of
from mue.layouts.observe.flow.matrices import Claim, Roles
from mue.layouts.observe.flow.vectors import Vectors
from mue.layouts.observe.param_use import ParamUse
from mue.rules.roles import ROLES

_LOOKUPS = ("embedding", "index", "index_select")


@dataclass(frozen=True)
class ParamVerdict:
    """What one parameter is proposed to be.

    Attributes:
        role: None where nothing is proposed. look: why it has to be looked at; empty where it was decided.
        after: parameters of the projections whose scale a norm's gain cancels. unseen: the pass did not use it.
        order: how its parts lie, as :class:`mue.layouts.layout.Layout` says it.
    """

    role: str | None
    how: str
    look: str = ""
    axes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    start: float | str | None = None
    after: frozenset[str] = frozenset()
    unseen: bool = False
    order: str = BLOCKS


@dataclass(frozen=True)
class Observed:
    """A model's forward pass, and what it started from.

    Attributes:
        shapes: of the parameters. uses: which axes are summed over. constants: the one number that a parameter starts at, None
            where it is no one number. tokens: what the model was given.
    """

    flow: Flow
    roles: Roles
    vectors: Vectors
    shapes: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, ParamUse]
    constants: Mapping[str, float | None]
    tokens: Sequence[Tensor]
    width: int
    products: Mapping[str, Sequence[WeightProduct]] = field(default_factory=dict)

    def verdict(self, name: str) -> ParamVerdict:
        """What is proposed for a parameter."""
        products = self.products.get(name, ())
        lookups = [x for x in self.flow.lookups if name in self.flow.parameters[x.weight]]
        if lookups:
            return self._table(name, [x.index for x in lookups], products)
        if products:
            return self._matrix(name, products)
        if name in self.flow.filters:
            how = "a filter of a convolution: its fan-in does not grow"
            return self._vector(name, Claim("norm", how, "it is treated like a gain"))
        uses = [u for u in self.flow.uses if name in self.flow.parameters[u.weight]]
        if uses:
            return self._elementwise(name, uses)
        look = "the forward pass was not seen to use it: leave it alone with the role unplanned, or say what it is"
        return ParamVerdict(None, "", look, unseen=True)

    # ---- tables

    def _table(self, name: str, indices: Sequence[int], products: Sequence[WeightProduct]) -> ParamVerdict:
        how, look = "rows looked up by the tokens", ""
        if not all(self._is_tokens(self.flow.value(i)) for i in indices):
            look = "rows looked up by numbers that are not the tokens of sequences"
        others = {c.role for p in products for c in self.roles.claims.get((p.node, None), [])}
        if products and others != {"head"}:
            look = "it is looked up, and multiplied by elsewhere"
        if len({p for x in self.flow.lookups for p in self.flow.parameters[x.weight]}) > 1:
            look = look or "several tables are looked up by what depends on the tokens"
        return (
            ParamVerdict("embedding", how, look, ("in", "out"))
            if len(self.shapes[name]) == 2
            else ParamVerdict(None, how, look)
        )

    @cached_property
    def _read(self) -> frozenset[Origin]:
        """What products read, but for what only chose for them."""
        flow = self.flow
        every = [item for p in flow.products.values() for item in flow.origins[p.reads].items()]
        return frozenset(o for o, ways in every if not all(way & Passage.CHOSE for way in ways))

    def _is_tokens(self, index: Tensor | None) -> bool:
        return index is not None and any(
            not t.is_floating_point()
            and t.dim() > 1
            and t.numel() == index.numel()
            and torch.equal(t.flatten(), index.flatten())
            for t in self.tokens
        )

    def _positions(self, weight: int) -> bool:
        """Whether a weight is rows of a table that are counted through, 0, 1, 2, ..., or its first rows, one for each token."""
        nodes = self.flow.nodes
        while nodes[weight].op not in _LOOKUPS:
            if nodes[weight].op == "slice":
                return nodes[weight].shape[-2:-1] in {t.shape[1:2] for t in self.tokens}
            before = [i for _, i in nodes[weight].inputs if self.flow.parameters.get(i)]
            if len(before) != 1:
                return False
            weight = before[0]
        index = nodes[nodes[weight].inputs[-1][1]].tensor
        if index is None:
            return False
        found = sorted(set(index.flatten().tolist()))
        return len(found) > 1 and found == list(range(len(found)))

    # ---- matrices

    def _matrix(self, name: str, products: Sequence[WeightProduct]) -> ParamVerdict:
        read = [self._parts(p) for p in products]
        roles, how, look = read[0]
        if any(r[0] != roles for r in read):
            look = "it is used in different ways in different places"
        if any(len(p.parameters) > 1 for p in products):
            look = look or "what multiplies is made of several parameters"
        if any(name in self.flow.parameters[u.weight] for u in self.flow.uses):
            look = look or "it is met element by element as well"
        if len({self.roles.branch_of.get(p.node) for p in products}) > 1:
            look = look or "several branches read it: say in layers= which"
        axes, doubt = self._axes(name, roles[0] if roles else "", products)
        look = look or doubt
        if not roles or not all(roles):
            return self._by_name(name, axes, how, look, products)
        if self.constants[name] == 0:
            look = look or "its code starts it at 0: add start=0.0 if that is meant"
        if len(roles) == 1:
            return ParamVerdict(roles[0], how, look, axes)
        size = prod(n for n, axis in zip(self.shapes[name], axes, strict=False) if axis == "out")
        orders = {order_of(self.flow, self.roles, p.node, roles, size) for p in products}
        order = orders.pop() if len(orders) == 1 else UNKNOWN
        if order == UNKNOWN:
            look = look or "in which order the rows of its parts lie fits none that is known: say order= if it does"
        return ParamVerdict(roles[0], how, look, axes, roles, order=order)

    def _parts(self, product: WeightProduct) -> tuple[tuple[str, ...], str, str]:
        """Roles of the matrices fused in a product, in the order of their first outputs, how they were read, and what is in doubt."""
        claims: list[tuple[int | None, Claim]] = [
            (origin[1], c) for origin, many in self.roles.claims.items() if origin[0] == product.node for c in many
        ]
        look = next((c.doubt for _, c in claims if c.doubt), "")
        if claims and any(o[0] == product.node and o not in self.roles.claims for o in self._read):
            look = look or "a matrix reads a part of its outputs for which no role was found"
        by_start: dict[int | None, set[str]] = {}
        for start, claim in claims:
            by_start.setdefault(start, set()).add(claim.role)
        found = {r for roles in by_start.values() for r in roles}
        if any(len(roles) > 1 for roles in by_start.values()) or (None in by_start and len(found) > 1):
            order = [r for r in ROLES if r in found]
            return tuple(order), claims[0][1].how, f"it is {' and '.join(order)}, in an order that was lost on the way"
        roles: list[str] = []
        for _, (role, *_) in sorted(((s or 0), tuple(r)) for s, r in by_start.items()):
            if role not in roles:
                roles.append(role)
        how = (
            claims[0][1].how
            if len(roles) == 1
            else f"{len(roles)} fused, in the order of their first outputs"
            if roles
            else ""
        )
        return tuple(roles), how, look or ("" if roles else "where its values go is none of the known ways")

    def _axes(self, name: str, role: str, products: Sequence[WeightProduct]) -> tuple[tuple[str, ...], str]:
        """What each axis is, and what is in doubt about it."""
        shape, summed = self.shapes[name], self.uses[name].summed
        inner = next(iter(summed), ())
        if len(summed) != 1 or not inner:
            return ("out", "in")[-len(shape) :] if len(
                shape
            ) <= 2 else (), "which of its axes is summed over was not seen"
        axes = ["in" if i in inner else "out" for i in range(len(shape))]
        kind = ROLES[role].kind if role in ROLES else ""
        if kind in ("expert", "shared"):
            counts = set(self.roles.routers.values())
            at = [i for i, n in enumerate(shape) if axes[i] == "out" and n in counts and len(shape) > 2]
            if len(at) == 1 and len(shape) == 3 and axes.count("out") == 2:
                axes[at[0]] = "expert"
            elif len(shape) != 2:
                return tuple(axes), "which of its axes counts the experts could not be told"
        elif len(shape) > 2:
            return tuple(axes), "it has more than two axes"
        return tuple(axes), ""

    def _by_name(
        self, name: str, axes: tuple[str, ...], how: str, look: str, products: Sequence[WeightProduct]
    ) -> ParamVerdict:
        """A proposal by name, or by what reads it, for what the flow left open."""
        decision = decide(self._facts(name))
        role = decision.role if decision.role is not None and ROLES[decision.role].drawn else None
        if role is not None:
            return ParamVerdict(role, how, f"{look}; its name says {role}", axes, decision.parts)
        readers = {
            c.role
            for p in products
            for q in self.flow.products.values()
            if any(o[0] == p.node for o in self.flow.origins[q.reads])
            for c in self.roles.claims.get((q.node, None), [])
        }
        if len(readers) == 1 and (role := readers.pop()) in ROLES and ROLES[role].reads_residual:
            return ParamVerdict(role, how, f"{look}; a matrix reads it that is {role}", axes)
        if all(p.reads in self.flow.stream and 4 * p.features <= self.width for p in products):
            return ParamVerdict("router", how, f"{look}; its few outputs may weigh something, as a router's do", axes)
        return ParamVerdict(None, how, look, axes)

    def _facts(self, name: str) -> Facts:
        shape = self.shapes[name]
        rows = {self.shapes[p][0] for x in self.flow.lookups for p in self.flow.parameters[x.weight]}
        follows = tuple(frozenset({"vocabulary"}) if n in rows else frozenset[str]() for n in shape)
        is_width = tuple(n == self.width for n in shape)
        return Facts(pattern_of(name), shape, self.uses[name], follows, is_width, self.constants[name])

    # ---- vectors

    def _elementwise(self, name: str, uses: Sequence[Use]) -> ParamVerdict:
        read = [self.vectors.claim(u) for u in uses]
        claims = {c.role: c for c, _ in read}
        if len(claims) == 1 and "" not in claims:
            claim = next((c for c, _ in read if c.doubt), read[0][0])
            after = frozenset(p for _, ends in read for n in ends for p in self.flow.products[n].parameters)
            return replace(self._vector(name, claim, [u.weight for u in uses]), after=after)
        weights = [u.weight for u in uses]
        streams = [u.activation in self.flow.stream for u in uses]
        if all(streams) and all(u.op == "add" for u in uses):
            sure = all(self._positions(w) for w in weights)
            axes = ("in",) * (len(self.shapes[name]) - 1) + ("out",)
            if sure and len(axes) == 2:
                return ParamVerdict("position", "rows looked up by their number, and added to the embedding", "", axes)
            if len(axes) > 1:
                return ParamVerdict("position", "", "added to the stream: is it a table of positions?", axes)
        how = next(c.how for c, _ in read if not c.role or len(claims) > 1)
        decision = decide(self._facts(name))
        role = decision.role if decision.role and ROLES[decision.role].vector else "norm"
        if decision.role == "router_bias":
            role = "router_bias"
        said = f"{how}: planned as {role}, which is neither drawn nor decayed"
        return self._vector(name, Claim(role, how, said))

    def _vector(self, name: str, claim: Claim, weights: Sequence[int] = ()) -> ParamVerdict:
        """A vector with what it starts at: gains at 1, or at 0 where the code adds 1."""
        constant, look = self.constants[name], claim.doubt
        start: float | str | None = "own" if constant is None else float(f"{constant:.6g}")
        role = claim.role
        if role in ROLES and ROLES[role].gain and not look:
            shifted = bool(weights) and all(self._shifted(w) for w in weights)
            if start == (0.0 if shifted else 1.0):
                start = 0.0 if shifted else None
            else:
                look = f"a gain that starts at {'other numbers' if constant is None else f'{constant:g}'}"
        elif role == "bias":
            if constant not in (0.0, None):
                look = look or f"a bias that starts at {constant:g}"
            start = start if look else None  # drawn by torch's own default or 0: the plan starts it at 0
        return ParamVerdict(role, claim.how, look, ("vector",) * len(self.shapes[name]), start=start)

    def _shifted(self, weight: int) -> bool:
        """Whether the code adds a constant to a parameter before it uses it."""
        nodes = self.flow.nodes
        while nodes[weight].op != "parameter":
            node = nodes[weight]
            if node.op in ("add", "rsub"):
                added = [a for a in node.args if isinstance(a, int | float)]
                return len(node.inputs) > 1 or any(added)
            weight = next(i for _, i in node.inputs if self.flow.parameters.get(i))
        return False
