"""Where every value of a recorded forward pass comes from: which matrices, on which ways, from which of their outputs.

A matrix's result is followed until the next matrix reads it. On the way it is known whether it stayed linear, met another
activation, was contracted with one, or chose something. The residual stream is what embeddings start and branches are added to.
No name of a parameter or module is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from mue.layouts.observe.flow.flow import Flow, Kind, Lookup, Origin, Origins, Passage, StreamBranch, Use, WeightProduct
from mue.layouts.observe.flow.graph import Node
from mue.layouts.observe.param_use import SUMS

# Kernels by name, whole. What is linear in each of its activations; every other kernel is taken to bend what it reads.
_LINEAR = re.compile(
    r"view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|expand|expand_as|unsqueeze|squeeze|slice|select|split|unbind"
    r"|split_with_sizes|clone|contiguous|_to_copy|detach|alias|as_strided|unfold|constant_pad_nd|flip|roll|neg|native_dropout"
    r"|sum|mean|cumsum|repeat|tril|triu|diagonal|movedim|add|sub|rsub|mul|div|cat|stack|where|copy|overwritten|masked_\w+"
    r"|index|index_(select|put|add|copy)|gather|scatter|scatter_(add|reduce)|repeat_interleave|view_as_(real|complex)|_conj"
)
_REDUCTIONS = re.compile(r"sum|mean|var|std|norm|linalg_vector_norm|amax|amin|max|var_mean|logsumexp")
_SHAPING = re.compile(r"view|_unsafe_view|reshape|expand|unsqueeze|squeeze|clone|_to_copy|detach|alias|contiguous")
_SECOND = ["index", "index_put", "masked_fill", "masked_scatter", "masked_select", "embedding", "repeat_interleave"]
_THIRD = ["index_select", "gather", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce"]
# Arguments that say which entries of others are taken.
_CHOOSES = {"where": (0,), **dict.fromkeys(_SECOND, (1,)), **dict.fromkeys(_THIRD, (2,))}
# Norms that are one kernel: the arguments that are its gain and its bias.
NORMS: Mapping[str, tuple[int, int | None]] = {
    "native_layer_norm": (2, 3),
    "_fused_rms_norm": (2, None),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
}
_LOOKUPS = ("embedding", "index", "index_select")


def flow_of(nodes: Sequence[Node], ends: Iterable[int]) -> Flow:
    """Follow every value of a recorded pass that what the model returned (``ends``) was made of."""
    flow = Flow(nodes)
    live = flow.leads_to(ends)
    for n, node in enumerate(nodes):
        flow.origins.append({})
        flow.kinds.append(_kind(flow, node))
        if flow.kinds[n] is Kind.WEIGHT:
            own = frozenset({node.name}) if node.op == "parameter" else frozenset()
            flow.parameters[n] = own.union(*(flow.parameters.get(i, frozenset()) for _, i in node.inputs))
        elif flow.kinds[n] is Kind.ACTIVATION and node.inputs and n in live:
            _Step(flow, n).take()
    return flow


def _kind(flow: Flow, node: Node) -> Kind:
    if not node.inputs:
        given = {"parameter": Kind.WEIGHT, "input": Kind.ACTIVATION}
        return given.get(node.op, Kind.CONSTANT)
    first = node.inputs[0][1]
    picks = node.op in ("index", "index_select") and flow.kinds[first] is Kind.WEIGHT
    if picks and any(flow.origins[i] for _, i in node.inputs[1:]):
        return Kind.WEIGHT  # experts that a router picked: their weights still
    return min((flow.kinds[i] for _, i in node.inputs), key=lambda kind: kind.value)


def _with(origins: Origins, way: Passage) -> Origins:
    return {origin: frozenset(w | way for w in ways) for origin, ways in origins.items()}


def _union(many: Iterable[Origins]) -> Origins:
    found: dict[Origin, frozenset[Passage]] = {}
    for origins in many:
        for origin, ways in origins.items():
            found[origin] = found.get(origin, frozenset()) | ways
    return found


class _Step:
    """One node: what its kernel makes of the origins of what it read."""

    def __init__(self, flow: Flow, n: int) -> None:
        self.flow, self.n, self.node = flow, n, flow.nodes[n]
        self.op = self.node.op
        self.acts = [(p, i) for p, i in self.node.inputs if flow.kinds[i] is Kind.ACTIVATION]
        self.weights = [(p, i) for p, i in self.node.inputs if flow.kinds[i] is Kind.WEIGHT]

    def take(self) -> None:
        flow, n = self.flow, self.n
        if self.op in SUMS and self._sum():
            return
        if self.op in NORMS and self.acts[0][0] == 0:
            if not self.node.output:  # the others are its statistics
                self._norm()
            return
        if self.op in _LOOKUPS and self.weights and self.weights[0][0] == 0:
            index = self.acts[0][1]
            flow.lookups.append(Lookup(self.weights[0][1], index, n))
            if self._of_sequences(index):
                flow.stream.add(n)
            return
        for _, w in self.weights:
            flow.uses.append(Use(self.op, w, self.acts[0][1], n))
        self._follow()
        self._cut()

    def _of_sequences(self, index: int) -> bool:
        """Whether there is a number for each token of sequences, and not one for each of them, as for classes."""
        many, nodes = prod(self.flow.nodes[index].shape), self.flow.nodes
        return any(n.op == "input" and not n.floating and len(n.shape) > 1 and prod(n.shape) == many for n in nodes)

    # ---- kernels with a meaning of their own

    def _sum(self) -> bool:
        """A product: of weights and activations, or of two activations."""
        flow, n, sides = self.flow, self.n, SUMS[self.op]
        weights = [(p, i) for p, i in self.weights if p in sides]
        acts = [(p, i) for p, i in self.acts if p in sides]
        rest = [i for p, i in self.acts if p not in sides]
        if "convolution" in self.op:
            for _, w in self.weights:
                flow.filters |= flow.parameters[w]
            flow.origins[n] = flow.origins[self.acts[0][1]]
            return True
        if len(weights) == 1 and len(acts) == 1:
            (position, weight), (_, reads) = weights[0], acts[0]
            last = position == max(sides)  # the right operand's columns are the features, or the left one's rows
            shape = self.node.shape
            vector = len(flow.nodes[weight].shape) == 1
            features = 1 if vector else shape[-1] if last or len(shape) < 2 else shape[-2]
            flow.products[n] = WeightProduct(n, weight, reads, flow.parameters[weight], features)
            step = 1 if last or len(shape) < 2 else shape[-1]
            flow._frames[self.node.storage] = (self.node.offset, step, features)
            flow.origins[n] = _union([{(n, None): frozenset({Passage.LINEAR})}, *(flow.origins[i] for i in rest)])
            for p, w in self.weights:
                if p not in sides:
                    flow.uses.append(Use(self.op, w, n, n, "bias"))
            return True
        if len(acts) == 2:
            a, b = acts[0][1], acts[1][1]
            flow.contractions[n] = (a, b)
            flow.origins[n] = _union(
                [*(_with(flow.origins[i], Passage.MIXED) for i in (a, b)), *(flow.origins[i] for i in rest)]
            )
            if (a in flow.stream) != (b in flow.stream):
                flow.stream.add(n)  # streams that are mixed, or tokens that are sent to experts
            return True
        return False

    def _norm(self) -> None:
        flow, n = self.flow, self.n
        gain, bias = NORMS[self.op]
        source = self.acts[0][1]
        for p, w in self.weights:
            slot = "gain" if p == gain else "bias" if p == bias else ""
            flow.uses.append(Use(self.op, w, source, n, slot))
        flow.origins[n] = flow.origins[source]
        flow.normed.add(n)
        if source in flow.stream:
            flow.stream.add(n)

    # ---- all others

    def _follow(self) -> None:
        """Origins, stream and norms of a kernel that is none of the above."""
        flow, n = self.flow, self.n
        chosen = _CHOOSES.get(self.op, ())
        taken = [i for p, i in self.acts if p not in chosen]
        choosing = [i for p, i in self.acts if p in chosen]
        if self.op in ("mul", "div", "sub") and len(taken) == 2 and self._statistic(*taken):
            return
        if self.op in ("mul", "div") and len(taken) == 2:
            self._times(*taken)
            return
        if self._residual(taken):
            return
        linear = bool(_LINEAR.fullmatch(self.op))
        way = Passage.LINEAR if linear else Passage.SOFTMAX | Passage.BENT if "softmax" in self.op else Passage.BENT
        if not self.node.floating:
            way |= Passage.CHOSE | Passage.BENT
        parts = [_with(flow.origins[i], way) for i in taken]
        flow.origins[n] = _union([*parts, *(_with(flow.origins[i], Passage.CHOSE) for i in choosing)])
        reduced = _REDUCTIONS.fullmatch(self.op) and self._reduces_features(taken)
        if reduced or (taken and all(i in flow.narrow for i in taken) and self._keeps_narrow()):
            flow.narrow.add(n)
        elif linear and self.node.floating and taken and all(i in flow.stream for i in taken):
            flow.stream.add(n)
        if len(taken) == 1 and taken[0] in flow.normed and linear:
            flow.normed.add(n)

    def _reduces_features(self, taken: Sequence[int]) -> bool:
        """Whether a sum, mean or norm is over the last axis, and that is the features (streams may be summed there)."""
        width = {self.flow.nodes[x.result].shape[-1] for x in self.flow.lookups}
        if not taken or (self.node.shape[-1:] and self.node.shape[-1] in width):
            return False
        rank = len(self.flow.nodes[taken[0]].shape)
        axes = [d for a in self.node.args for d in (a if isinstance(a, list | tuple) else [a]) if type(d) is int]
        return any(d % max(rank, 1) == rank - 1 for d in axes)

    def _keeps_narrow(self) -> bool:
        shaping, linear = _SHAPING.fullmatch(self.op), _LINEAR.fullmatch(self.op)
        return bool(shaping) or not linear or self.op in ("add", "sub", "mul", "div", "neg")

    def _statistic(self, a: int, b: int) -> bool:
        """``a`` over one of its own statistics, as norms and softmaxes do: that is ``a`` still."""
        flow, n = self.flow, self.n
        if self.op == "mul" and a in flow.narrow and b not in flow.narrow:
            a, b = b, a
        own = {p for p, _ in flow.origins[b]} <= {p for p, _ in flow.origins[a]}
        if b not in flow.narrow or a in flow.narrow or not own:
            return False
        flow.origins[n] = flow.origins[a]
        if a in flow.stream:
            flow.stream.add(n)
        if self.op != "sub":
            flow.normed.add(n)
        return True

    def _times(self, a: int, b: int) -> None:
        """Two activations, element by element: a gate, a function of itself times itself, or a mask."""
        flow, n = self.flow, self.n
        one, other = flow.origins[a], flow.origins[b]
        for mask, rest in ((a, b), (b, a)):
            plain = not flow.origins[mask] and mask not in flow.stream
            if plain and (self.op == "mul" or rest == a):
                flow.origins[n] = flow.origins[rest]
                if rest in flow.stream:
                    flow.stream.add(n)
                return
        if self.op == "div":
            other = _with(other, Passage.BENT)
        found = dict(_union([_with(one, Passage.TIMES), _with(other, Passage.TIMES)]))
        for origin in set(one) & set(other):
            # x · sigmoid(x): a function of x alone, unless the two are different parts of x and it was lost which
            product = flow.nodes[origin[0]]
            half = min(prod(flow.nodes[i].shape) for i in (a, b)) < prod(product.shape) and origin[1] is None
            way = Passage.BENT | Passage.TIMES | (Passage.TORN if half else Passage.LINEAR)
            found[origin] = frozenset(w | way for w in found[origin])
        flow.origins[n] = found

    def _residual(self, taken: Sequence[int]) -> bool:
        """A sum of the stream and what came out of matrices is the stream from then on."""
        flow = self.flow
        if self.op != "add" or len(taken) != 2:
            return False
        for stream, added in (taken, taken[::-1]):
            if stream in flow.stream and added not in flow.stream and flow.origins[added]:
                flow.branches.append(StreamBranch(self.n, added))
                flow.stream.add(self.n)
                return True
        return False

    def _cut(self) -> None:
        """Where a view takes a part of a product's outputs, say where that begins."""
        flow, node = self.flow, self.node
        frame = flow._frames.get(node.storage)
        whole = [o for o in flow.origins[self.n] if o[1] is None]
        source = next((i for _, i in self.acts), None)
        if frame is None:
            if (
                source is not None
                and node.contiguous
                and whole
                and (old := flow._frames.get(flow.nodes[source].storage)) is not None
                and flow.nodes[source].shape == node.shape
                and old[1] == 1
                and node.shape
                and node.shape[-1] == old[2]
            ):  # the same numbers, moved by a bias, a cast or a function: parts lie in it as they did
                flow._frames[node.storage] = (node.offset, 1, old[2])
            return
        first, step, features = frame
        if source is None or flow.nodes[source].storage != node.storage:
            return
        found: dict[Origin, frozenset[Passage]] = {}
        for origin, ways in flow.origins[self.n].items():
            part = prod(node.shape) < prod(flow.nodes[origin[0]].shape)
            start = (node.offset - first) // step % features if part or origin[1] is not None else None
            found[(origin[0], start)] = found.get((origin[0], start), frozenset()) | ways
            if start is not None:
                outputs = _outputs(node, first, step, features)
                known = flow.outputs.get((origin[0], start), outputs)
                flow.outputs[(origin[0], start)] = min(outputs, known, key=len)
        flow.origins[self.n] = found


def _outputs(view: Node, first: int, step: int, features: int) -> frozenset[int]:
    """Which outputs of a product a view of it holds."""
    found = {view.offset - first}
    for size, stride in zip(view.shape, view.strides, strict=True):
        if stride % (step * features):  # or it counts tokens
            found = {entry + i * stride for entry in found for i in range(size)}
    return frozenset(entry // step % features for entry in found)
