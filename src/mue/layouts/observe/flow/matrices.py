"""What a matrix is for, from where its values go: the queries meet keys before a softmax, a gate is bent and multiplied.

A claim is sure where the flow of values allows one reading only. What is usual but could be otherwise is not, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from mue.layouts.observe.flow.flow import Flow, Kind, Origin, Passage, WeightProduct
from mue.rules.roles import ROLES

_SWAPS = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "slice", "clone")
GATE_OF_ATTENTION = "it multiplies attention's output, which no role of its own says"


@dataclass(frozen=True)
class Claim:
    """One reading of a matrix, or of a part of its outputs. ``doubt``: why it is not sure; empty where it is."""

    role: str
    how: str
    doubt: str = ""


@dataclass
class Roles:
    """What was found of products.

    Attributes:
        claims: origin → readings. branch_of: node of a product → number of its branch. kinds: of a branch: attention, ffn, or both.
        routers: products that choose experts → how many. unsaid: queries or keys that no softmax tells apart → the node in which
            their values are mixed.
    """

    claims: dict[Origin, list[Claim]] = field(default_factory=dict)
    branch_of: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, set[str]] = field(default_factory=dict)
    routers: dict[int, int] = field(default_factory=dict)
    unsaid: dict[Origin, int] = field(default_factory=dict)

    def add(self, origin: Origin, role: str, how: str, doubt: str = "", branch: int | None = None) -> None:
        claim = Claim(role, how, doubt)
        if claim not in self.claims.setdefault(origin, []):
            self.claims[origin].append(claim)
        if branch is not None:
            self.branch_of.setdefault(origin[0], branch)


def roles_of(flow: Flow, width: int, local: Callable[[int, int], bool | None]) -> Roles:
    """Read the products of a flow.

    Args:
        width: of the residual stream. local: of a product and a node, whether each token's values are felt there at that token
            alone (:func:`mue.layouts.observe.flow.locality.acts_at_its_own_position`).
    """
    roles = Roles()
    scores: dict[Origin, set[str]] = {}
    for origin, side in _scores(flow):
        scores.setdefault(origin, set()).add(side)
    for number, branch in enumerate(flow.branches):
        _Branch(flow, roles, width, number, branch.added, scores).read()
    said = {origin[0] for origin in roles.claims}
    for node, mixed in {origin[0]: mixed for origin, mixed in roles.unsaid.items()}.items():
        own = local(node, mixed) if node not in said else None  # one that is fused with others has no row of its own
        role = "" if own is None else "attention_q" if own else "attention_k"
        why = "no softmax tells queries from keys: one token was changed, which a query feels at its own position alone"
        for origin in roles.unsaid:
            if origin[0] == node:
                roles.add(origin, role, "acts at its own position alone" if own else "acts at other positions", why)
    _heads(flow, roles)
    return roles


# ---- queries and keys --------------------------------------------------------------------------------------------------


def _scores(flow: Flow) -> Iterator[tuple[Origin, str]]:
    """Origins that meet in products of activations before a softmax: ``q`` where a row of the softmax is theirs, ``k`` along it."""
    for n, node in enumerate(flow.nodes):
        if "softmax" not in node.op or flow.kinds[n] is not Kind.ACTIVATION or not node.shape:
            continue
        dim = next((a for a in node.args if type(a) is int), -1) % len(node.shape) - len(node.shape)
        found = _back(flow, node.inputs[0][1], dim)
        if found is None:
            continue
        product, at = found
        a, b = flow.contractions[product]
        query, key = (a, b) if at == -1 else (b, a)
        for side, name in ((query, "q"), (key, "k")):
            for origin, ways in flow.origins[side].items():
                if not all(way & Passage.MIXED for way in ways):
                    yield origin, name


def _back(flow: Flow, n: int, dim: int) -> tuple[int, int] | None:
    """The product of activations that a tensor's axis (counted from the end) goes back to, and which axis of it that is."""
    while n not in flow.contractions:
        node = flow.nodes[n]
        acts = [i for _, i in node.inputs if flow.origins[i] and i not in flow.narrow]
        mixed = [i for i in acts if any(w & Passage.MIXED for ways in flow.origins[i].values() for w in ways)]
        if len(mixed) != 1 or n in flow.products:
            return None
        source = mixed[0]
        shape, before = node.shape, flow.nodes[source].shape
        if node.op == "permute":
            dim = node.args[1][dim] % len(before) - len(before)
        elif node.op in ("transpose", "t"):
            pair = [d % len(before) - len(before) for d in node.args[1:3]] if node.op == "transpose" else [-1, -2]
            dim = pair[1 - pair.index(dim)] if dim in pair else dim
        elif node.op in _SWAPS or node.op == "alias":
            same = _same_axis(shape, before, dim)
            if same is None:
                return None
            dim = same
        elif len(shape) != len(before):
            return None
        n = source
    rank = len(flow.nodes[n].shape)
    return (n, dim) if rank >= 2 and dim in (-1, -2) else None


def _same_axis(shape: Sequence[int], before: Sequence[int], dim: int) -> int | None:
    """The axis of ``before`` that a reshape made axis ``dim`` of."""
    after = prod(shape[len(shape) + dim + 1 :])
    fits = [
        d - len(before)
        for d in range(len(before))
        if before[d] == shape[dim] and prod(before[d + 1 :]) == after and before[d] > 1
    ]
    return fits[0] if len(fits) == 1 else None


# ---- branches ----------------------------------------------------------------------------------------------------------


@dataclass
class _Branch:
    """What is added to the stream at one place."""

    flow: Flow
    roles: Roles
    width: int
    number: int
    added: int
    scores: Mapping[Origin, set[str]]

    def read(self) -> None:
        origins = self.flow.origins[self.added]
        writers = {o: ways for o, ways in origins.items() if not self.flow.bent(ways)}
        gates = [o for o in origins if o not in writers]
        experts = self._experts(writers, gates)
        feeding = [o for o in writers if o not in experts and not self._mixes(o)]
        many = [o for o in gates if self.flow.products[o[0]].features > 1]
        for gate in gates:
            self._gate(gate, experts, many)
        for writer, ways in writers.items():
            times = any(way & (Passage.TIMES | Passage.MIXED) for way in ways)
            kind = "expert" if writer in experts else "shared" if experts else "ffn"
            doubt = "something that is no router weighs it" if times and kind == "ffn" else ""
            if len(feeding) > 1 and kind != "expert" and writer in feeding:
                doubt = doubt or "several feed-forwards are added at once: are some of them experts?"
            self._writer(writer, kind, doubt)

    def _mixes(self, writer: Origin) -> bool:
        """Whether it reads what was mixed over positions."""
        origins = self.flow.origins[self.flow.products[writer[0]].reads]
        return any(way & Passage.MIXED for ways in origins.values() for way in ways)

    def _experts(self, writers: Mapping[Origin, frozenset[Passage]], gates: Sequence[Origin]) -> set[Origin]:
        """The writers that a router weighs: as many as it has outputs, or with an axis that is as long."""
        found: set[Origin] = set()
        for gate in gates:
            many = self.flow.products[gate[0]].features
            if many < 2:
                continue
            weighed = {o for o, ways in writers.items() if all(w & (Passage.TIMES | Passage.MIXED) for w in ways)}
            stacked = {o for o in weighed if self._experts_inside(self.flow.products[o[0]], many)}
            apart = weighed - stacked
            if len({p for o in apart for p in self.flow.products[o[0]].parameters}) > 1:
                found |= apart
            found |= stacked
        return found

    def _experts_inside(self, product: WeightProduct, many: int) -> bool:
        return any(
            many in node.shape and len(node.shape) > 2
            for node in self.flow.nodes
            if node.op == "parameter" and node.name in product.parameters
        )

    def _gate(self, gate: Origin, experts: set[Origin], many: Sequence[Origin]) -> None:
        product = self.flow.products[gate[0]]
        counted = {p for o in experts for p in self.flow.products[o[0]].parameters}
        inside = any(self._experts_inside(self.flow.products[o[0]], product.features) for o in experts)
        how = f"its {product.features} outputs weigh as many experts"
        if experts and len(many) == 1 and gate == many[0] and (inside or len(counted) == product.features):
            self.roles.routers[gate[0]] = product.features
            self._add(gate, "router", how)
        elif experts and product.features > 1:
            self.roles.routers[gate[0]] = product.features
            self._add(gate, "router", how, f"{len(counted)} experts were seen to be used")
        else:
            self._add(
                gate,
                "router",
                "it weighs what a branch adds",
                "no experts are chosen by it: planned as a router of few",
            )

    def _writer(self, writer: Origin, kind: str, unusual: str) -> None:
        flow = self.flow
        product = flow.products[writer[0]]
        reads = flow.origins[product.reads]
        origins = {o: ways for o, ways in reads.items() if not all(way & Passage.CHOSE for way in ways)}
        doubt = "" if product.features == self.width else "it does not write as many numbers as the stream has"
        doubt = doubt or ("" if writer[1] is None else "a part of its outputs alone is added to the stream")
        if not origins:
            return
        if self._mixes(writer):
            self._attention(writer, origins, doubt)
            return
        doubt = doubt or unusual
        self.roles.kinds.setdefault(self.number, set()).add("ffn")
        sure = self._feed_forward(origins, kind, doubt)
        self._add(writer, f"{kind}_down", "reads what was bent, and is added to the stream", doubt or sure)

    def _attention(self, writer: Origin, origins: Mapping[Origin, frozenset[Passage]], doubt: str) -> None:
        flow, others = self.flow, []
        self.roles.kinds.setdefault(self.number, set()).add("attention")
        soft = any(way & Passage.SOFTMAX for ways in origins.values() for way in ways)
        for origin, ways in origins.items():
            sides = self.scores.get(origin, set())
            mixed = all(way & Passage.MIXED for way in ways)
            if not mixed:
                others.append(origin)
            elif not flow.bent(ways) and not sides:
                why = "" if soft else "attention without a softmax: the values are what stays linear"
                self._add(origin, "attention_v", "mixed over positions, and linear until the output", why)
            elif sides:
                for side in sides:
                    rows = "a row of the softmax is its position's"
                    self._add(
                        origin, f"attention_{side}", rows if side == "q" else "the softmax runs over its positions"
                    )
                if not flow.bent(ways):
                    self._add(origin, "attention_v", "mixed over positions, and linear until the output")
            else:
                self.roles.unsaid[origin] = flow.products[writer[0]].reads
        for origin in others:
            self._add(origin, "attention_v", "reaches attention's output unmixed", GATE_OF_ATTENTION)
        more = "it reads more than the mixed values" if others else ""
        self._add(writer, "attention_o", "reads what was mixed, and is added to the stream", doubt or more)

    def _feed_forward(self, origins: Mapping[Origin, frozenset[Passage]], kind: str, doubt: str) -> str:
        """Up and gate; returns why they are in doubt."""
        flow = self.flow
        bent = [o for o, ways in origins.items() if flow.bent(ways)]
        plain = [o for o in origins if o not in bent]
        torn = any(way & Passage.TORN for ways in origins.values() for way in ways)
        times = all(any(way & Passage.TIMES for way in origins[o]) for o in (*bent, *plain))
        why = doubt
        if torn:
            why = "halves of its outputs meet, and which is which was lost on the way"
        elif len(bent) == 1 and not plain:
            self._add(bent[0], f"{kind}_up", "bent, and read by the next matrix", why)
            return why
        elif not (len(bent) == 1 and len(plain) == 1 and times):
            why = f"{len(bent)} inputs are bent and {len(plain)} are not: neither a plain feed-forward nor a gated one"
        for origin in bent:
            self._add(origin, f"{kind}_gate" if plain else f"{kind}_up", "bent, and multiplies the up projection", why)
        for origin in plain:
            self._add(origin, f"{kind}_up", "linear, and multiplied by the gate", why)
        return why

    def _add(self, origin: Origin, role: str, how: str, doubt: str = "") -> None:
        product = self.flow.products[origin[0]]
        if role in ROLES and ROLES[role].reads_residual and product.reads not in self.flow.stream:
            doubt = doubt or "it reads something else than the residual stream"
        self.roles.add(origin, role, how, doubt, self.number)


def _heads(flow: Flow, roles: Roles) -> None:
    """Products that read the stream when nothing is added to it any more, and that no other product reads."""
    inside = flow.leads_to([b.sum for b in flow.branches])
    read = {o[0] for p in flow.products.values() for o in flow.origins[p.reads]}
    last = [p for n, p in flow.products.items() if n not in inside and n not in read and p.reads in flow.stream]
    many = len({p.parameters for p in last}) > 1
    for product in last:
        doubt = "several matrices read the stream's end" if many else ""
        roles.add((product.node, None), "head", "reads the stream's end, and no matrix reads it", doubt)
