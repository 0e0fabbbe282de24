"""u-µP (Blake et al., arXiv 2407.17465) as far as the spec goes: the width of a dense model.

Its own form draws every weight at std 1 and uses it through 1/√fan_in (the head through 1/fan_in), with Adam rates
η/√fan_in for weights, η/√d for the embedding and η for head, norms and biases. Our models have no multiplier on every
matrix, so it stands here with 1/√fan_in folded into the weight (std × c, lr × c: docs/why/fold.md): hidden std
fan_in^-1/2, rate 1/fan_in. Weight decay is independent there, so lr·wd stays. Depth needs its rule for residual weights (τ),
which the spec does not give: refused. Unit scaling's own multipliers (α of each op) are not part of a plan.
"""

from __future__ import annotations

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import Row, Rule

d, o, H = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_H")


@RULES.register("u-mup", place=6)
def u_mup() -> Rule:
    """Width only, from a base that was u-µP itself."""

    def row(name: str, std: Monomial, lr: Monomial) -> Row:
        source = f"2407.17465, unit-scaling: {name}, folded; lr·wd constant; eps not given"
        # its decay is independent, p *= 1 - wd: in torch's form lr·wd has to stay
        return Row(init_std=std, lr=lr, weight_decay=1 / lr, source=source, unknown=("eps",))

    def hidden(fan_in: Monomial) -> Row:
        return row("weight", fan_in ** "-1/2", fan_in**-1)

    vector = row("norms and biases", ONE, ONE)
    return Rule(
        name="u-mup",
        title="u-µP",
        source="arXiv 2407.17465; graphcore-research/unit-scaling",
        rows={
            "embedding": row("embedding, a weight of fan-in d", ONE, d ** "-1/2"),
            **dict.fromkeys(of_kind("attention"), hidden(d)),
            "attention_o": hidden(o),
            "ffn_up": hidden(d),
            "ffn_gate": hidden(d),
            "ffn_down": hidden(H),
            "norm": vector,
            "qk_norm": vector,
            "bias": vector,
            "final_norm": vector,
            "head": row("output, forward 1/fan_in kept as the head multiplier", ONE, ONE),
        },
        unanswered=dict.fromkeys(
            ("patch_embedding", "time_embedding_in"),
            "u-µP's one input weight is the token embedding, a look-up with the rate of a fan-in d; of an input with a fan-in of its"
            " own the spec says nothing",
        ),
        head_multiplier=d**-1,
        routed=False,
        refuses={
            "moe": "u-µP has no answer for experts",
            "depth": "u-µP's depth rule needs its residual weights τ, which these plans do not carry",
            "tied": "u-µP's embedding and head take different rates, which a tied head cannot have",
            "batch": "u-µP gives no batch rule",
            "duration": "u-µP gives no duration rule",
        },
    )
