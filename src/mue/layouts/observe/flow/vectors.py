"""What a vector is for: the gain of a norm, a bias, or something that only its model's code knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mue.layouts.observe.flow.flow import Flow, Origin, Passage, Use
from mue.layouts.observe.flow.matrices import Claim, Roles

_ADDS = ("add", "sub", "rsub")


@dataclass(frozen=True)
class Vectors:
    """Reads the element-by-element uses of a flow.

    Attributes:
        leads: nodes that something is still made of which is added to the stream. before_head: nodes that a head reads.
    """

    flow: Flow
    roles: Roles
    leads: set[int]

    @cached_property
    def before_head(self) -> set[int]:
        heads = {o[0] for o, claims in self.roles.claims.items() if any(c.role == "head" for c in claims)}
        return self.flow.leads_to([self.flow.products[n].reads for n in heads])

    def claim(self, use: Use) -> tuple[Claim, frozenset[int]]:
        """What a use says of its parameter, and the products whose scale a norm before it cancels."""
        flow, none = self.flow, frozenset[int]()
        if use.slot == "bias" or (use.op in _ADDS and (use.activation in flow.normed or self._bare(use))):
            return Claim("bias", "added to what a matrix or a norm puts out"), none
        if not self._is_gain(use):
            return Claim("", f"met element by element ({use.op}), and it is neither a norm's gain nor a bias"), none
        if any(use.result in self._inputs(n) and flow.nodes[n].op in ("sum", "mean") for n in range(len(flow.nodes))):
            return Claim("", "multiplied and summed: it may be a matrix of one output"), none
        return self._gain(use)

    def _is_gain(self, use: Use) -> bool:
        return use.slot == "gain" or (use.op == "mul" and use.activation in self.flow.normed)

    def _inputs(self, n: int) -> list[int]:
        return [i for _, i in self.flow.nodes[n].inputs]

    def _gain(self, use: Use) -> tuple[Claim, frozenset[int]]:
        """Which norm a gain belongs to: by what it reads and where its result goes."""
        flow, none = self.flow, frozenset[int]()
        origins = flow.origins[use.activation]
        if use.activation in flow.stream:
            if use.result in self.leads:
                return Claim("norm", "gain of a norm of the residual stream"), none
            if use.result in self.before_head:
                if any(u.result > use.result and u.result in self.before_head and self._is_gain(u) for u in flow.uses):
                    return Claim("norm", "gain of a norm after the last branch, with another after it"), none
                return Claim("final_norm", "gain of the norm after the last branch"), none
            return Claim("norm", "gain of a norm", "it is neither before a branch nor before the head"), none
        roles = {c.role for o in origins for c in self.roles.claims.get(o, [])}
        mixed = any(way & Passage.MIXED for ways in origins.values() for way in ways)
        if roles and roles <= {"attention_q", "attention_k"} and not mixed:
            return Claim("qk_norm", "gain of a norm of queries or keys"), none
        ends = frozenset(o[0] for o in origins if self._ends(o))
        if ends and not self._read_on(use.result):
            return Claim("norm", "gain of a norm that ends a branch"), ends
        if roles and "" not in roles and "attention_v" not in roles:
            return Claim("norm", "gain of a norm inside a branch"), none
        return Claim("norm", "gain of a norm", "of what it normalises no role is known"), none

    def _ends(self, origin: Origin) -> bool:
        return any(c.role.endswith(("_o", "_down")) for c in self.roles.claims.get(origin, []))

    def _read_on(self, result: int) -> bool:
        """Whether a matrix reads what the norm puts out before it is added to the stream."""
        return any(
            p.reads == result or result in self._upstream(p.reads)
            for p in self.flow.products.values()
            if p.reads not in self.flow.stream and p.node > result
        )

    def _upstream(self, n: int) -> set[int]:
        """The nodes back to the matrices and the stream."""
        found, todo = set(), [n]
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                if one not in self.flow.products and one not in self.flow.stream:
                    todo += self._inputs(one)
        return found

    def _bare(self, use: Use) -> bool:
        """Whether a product's outputs alone were added to, reshaped at most."""
        n, nodes = use.activation, self.flow.nodes
        while n not in self.flow.products:
            node = nodes[n]
            if node.op not in (
                "view",
                "_unsafe_view",
                "reshape",
                "transpose",
                "permute",
                "unsqueeze",
                "squeeze",
                "alias",
            ):
                return False
            n = node.inputs[0][1]
        return True
