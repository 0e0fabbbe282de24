"""Jiang, Bordelon, Pehlevan, Hanin (arXiv 2601.20205 v3): mean-field MoE in width, depth and experts at fixed a/N.

The table of a co-author's repository (boris-hanin/ai-theorist, derivations/06-moe.md) with n = d, m = h, in ratios; weight
decay and eps from a port of their Table 2. Down projections start at √n/m, below fan-in by √(n/m), so that the update of
up and gate does not drift with the active width. Folded, its rates are Complete-muE's; the inits differ by √(H_act/d).

    h + (1/L)·f(LN h),  f = (1/a) Σ g_i E_i: with weights that sum to one the 1/a is in them already, so R = A = 1
"""

from __future__ import annotations

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import AUTHORS_CODE, INFERRED, Row, Rule

n, o, m, L = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_H"), ratio("ρ_L")


@RULES.register("jiang", place=8)
def jiang() -> Rule:
    """Between MoEs (or between dense models) of one sparsity a/N: width, depth, expert width, number of experts."""
    code, port = "derivations/06-moe.md", "weight decay and eps: a port of Table 2"

    def row(source: str, std: Monomial, lr: Monomial, wd: Monomial, eps: Monomial) -> Row:
        text = f"2601.20205, {code}: {source}; {port}"
        marks = {"init_std": AUTHORS_CODE, "lr": AUTHORS_CODE}
        return Row(init_std=std, lr=lr, weight_decay=wd, eps=eps, source=text, status=INFERRED, marks=marks)

    attention = row("attention", n ** "-1/2", n**-1, n, 1 / (n * L))
    up = row("W_up, n^-1/2 and 1/n", n ** "-1/2", n**-1, n, 1 / (m * L))
    down = row("W_down, √n/m and 1/m", n ** "1/2" / m, m**-1, m, n / (m**2 * L))
    return Rule(
        name="jiang",
        title="Mean-field MoE (Jiang et al.)",
        source="arXiv 2601.20205; boris-hanin/ai-theorist; a port of Table 2",
        rows={
            "embedding": row("embedding const", ONE, ONE, ONE, n**-1),
            **dict.fromkeys(of_kind("attention"), attention),
            "attention_o": row("attention, on its fan-in", o ** "-1/2", o**-1, o, 1 / (o * L)),
            "ffn_up": up,
            "ffn_gate": up,
            "ffn_down": down,
            "expert_up": up,
            "expert_gate": up,
            "expert_down": down,
            "router": Row(
                init_std=n**-1,
                lr=n**-1,
                weight_decay=n,
                source=f"2601.20205, {code}: router n^-γ with γ = 1, lr 1/n; decay as their code; eps not found",
                status=AUTHORS_CODE,
                unknown=("eps",),
            ),
            "router_bias": Row(source=f"2601.20205, {code}: init 0, rate constant, no optimizer", status=AUTHORS_CODE),
            "norm": Row(source=f"2601.20205: norms const; {port}"),
            "qk_norm": Row(source=f"2601.20205: norms const; {port}"),
            "bias": Row(eps=L**-1, source=f"2601.20205: biases const; {port}"),
            "final_norm": Row(source=f"2601.20205: norms const; {port}"),
            "head": Row(
                eps=n**-1,
                source="their experiments: 1/n on the logits, rate constant (theory, untied: std and rate 1/n); eps: the port",
            ),
        },
        residual_multiplier=L**-1,
        head_multiplier=n**-1,
        routed=False,
        refuses={
            "dense to moe": "Jiang et al. hold the sparsity a/N fixed and transfer between MoEs, not from a dense proxy"
            " (use complete-mue)",
            "sparsity": "Jiang et al. hold a/N fixed: their hyperparameters do not transfer across sparsity",
            "gates": "Jiang et al. in these plans needs weights that sum to one",
            "batch": "Jiang et al. give no batch rule",
            "duration": "Jiang et al. give no duration rule",
        },
        # below fan-in by √(n/m), down takes away what makes their update grow (docs/why/limits.md#up-and-gate)
        up_gate=ONE,
    )
