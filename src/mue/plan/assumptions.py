"""What a plan takes for granted of a router: what is exact, what training moves, and which share of the tokens an expert sees."""

from __future__ import annotations

from mue.shapes import Block
from mue.util.text import number


def of_gates(block: Block) -> str:
    """The weights of a block's router in one line (docs/why/index.md#gates)."""
    kind, a = block.router_kind, block.active
    if block.moments is None:
        text = "weights sum to 1 for every token, so that R = a is exact, in training too"
        if kind.even:
            text += "; all are even, F = 1"
        elif a > 1:
            text += f"; F is 1 for even weights and nears {a} as they sharpen: down's init takes 1"
        return text
    m1, m2 = block.moments
    whose = "measured" if block.gate_moments else "the router's own formula"
    text = f"m1 = {number(m1)}, m2 = {number(m2)} at init ({whose}), F = {number(block.gate_variance)}"
    if block.exact_sum:
        return f"{text}; weights sum to 1 for every token, so that R = a is exact, in training too, and F drifts"
    return f"{text}; R = a/m1 holds at init, and both drift as the router sharpens"


def of_tokens(block: Block) -> str:
    """How many experts a token has and how many tokens an expert, in one line (docs/why/limits.md#drift)."""
    kind = block.router_kind
    text = ""
    if kind.mean_active is not None:
        mean = kind.mean_active(block.active, block.experts, block.all_settings)
        text = f"a token has {number(mean)} experts at init on average (a = {block.active} is planned for), which differs by token and drifts; "
    return (
        f"{text}each expert is taken to see {number(block.share)} of the tokens;"
        " lr and weight decay do not depend on it, σ0 goes as share^-1/2"
    )
