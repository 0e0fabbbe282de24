"""How the matrices fused in one product lie along its outputs, from the views that take each of them out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mue.layouts.layout import BLOCKS, HEADS, ROWS, UNKNOWN
from mue.layouts.observe.flow.flow import Flow, Passage
from mue.layouts.observe.flow.matrices import Roles


def order_of(flow: Flow, roles: Roles, product: int, parts: Sequence[str], size: int) -> str:
    """One of :data:`mue.layouts.layout.ORDERS`: the one in which the parts take all outputs, each once.

    Args:
        product: its node. parts: the roles of the matrices, in the order of their first outputs. size: of all parts together, for one expert.

    Returns:
        ``"unknown"`` where none of the orders does, or where outputs are read that no view shows.
    """
    outputs: dict[str, set[int]] = {part: set() for part in parts}
    for origin, claims in roles.claims.items():
        for claim in claims if origin[0] == product else ():
            outputs[claim.role] |= flow.outputs.get(origin, frozenset())
    for part, found in outputs.items():
        one = {n % size for n in found}  # experts that one product has lie one after another, and all alike
        outputs[part] = one if len(found) * size == len(one) * flow.products[product].features else set()
    rows = [sorted(outputs[part]) for part in parts]
    every = list(range(size))
    if [n for part in rows for n in part] == every:
        return BLOCKS
    if all(part == every[i :: len(parts)] for i, part in enumerate(rows)):
        return ROWS
    turns = _key_heads(flow, roles, product, outputs)
    if turns and sorted(n for part in rows for n in part) == every and not any(len(part) % turns for part in rows):
        pieces = [(part, len(part) // turns) for part in rows]
        if [
            n for turn in range(turns) for part, size in pieces for n in part[turn * size : (turn + 1) * size]
        ] == every:
            return HEADS
    return UNKNOWN


def _key_heads(flow: Flow, roles: Roles, product: int, outputs: Mapping[str, set[int]]) -> int:
    """How many heads of keys a product has, from the size over which keys are summed with queries; 0 where that is not seen."""
    sizes = set()
    for left, right in flow.contractions.values():
        for origin, ways in (*flow.origins[left].items(), *flow.origins[right].items()):
            key = any(claim.role == "attention_k" for claim in roles.claims.get(origin, ()))
            if origin[0] == product and key and not all(way & Passage.MIXED for way in ways):
                sizes.add(flow.nodes[left].shape[-1])
    size = sizes.pop() if len(sizes) == 1 else 0
    rows = len(outputs.get("attention_k", ()))
    return rows // size if size and rows % size == 0 else 0
