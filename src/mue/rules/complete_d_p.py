"""Complete(d)P (Mlodozeniec et al., arXiv 2512.22382), Table 1, as two independent re-implementations quote it.

CompleteP with batch and duration (the SDE rule, iso-horizon), the head's multiplier folded away (so its std falls as
1/m_N, its lr as 1/m_N, and its eps does not move), the embedding's eps corrected, and the QK-norm gain, which heads
share, without the width in its eps. No author code was found: every row is marked inferred.
"""

from __future__ import annotations

from fractions import Fraction

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.completep import FIXED_RATIO
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.sde import sde
from mue.rules.table import Row, Rule

N, o, L = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_L")


@RULES.register("complete-d-p", place=4)
def complete_d_p(
    depth_exponent: Fraction = Fraction(1),
    duration_exponent: Fraction = Fraction(1, 2),
    betas: str = "linear",
    *,
    batch_exponent: Fraction = Fraction(1, 2),
    weight_decay_run: str = "follows-lr",
    eps_run: str = "follows-lr",
) -> Rule:
    """Complete(d)P for α in [1/2, 1]; ``duration_exponent`` is the change Marin made to it (about 0.3)."""
    α, run = depth_exponent, sde(batch_exponent, duration_exponent, weight_decay_run, eps_run, betas)
    inside = L ** (α - 1)

    def row(
        name: str,
        *,
        std: Monomial = ONE,
        lr: Monomial = ONE,
        wd: Monomial = ONE,
        eps: Monomial = ONE,
    ) -> Row:
        source = f"2512.22382 Table 1 as re-implemented: {name}"
        return Row(init_std=std, lr=lr * run.lr, weight_decay=wd * run.weight_decay, eps=eps * run.eps, source=source)

    def hidden(fan_in: Monomial) -> Row:
        return row("hidden weights", std=fan_in ** "-1/2", lr=inside / fan_in, wd=fan_in, eps=L**-α / fan_in)

    vector = row("hidden norms and biases (decay: 0 here, λ·s in its 'rest' row)", lr=inside, eps=L**-α / N)
    return Rule(
        name="complete-d-p",
        title="Complete(d)P",
        source="arXiv 2512.22382, Table 1, from two re-implementations",
        rows={
            "embedding": row("input embedding", eps=N**-1),
            **dict.fromkeys(of_kind("attention"), hidden(N)),
            "attention_o": hidden(o),
            "ffn_up": hidden(N),
            "ffn_gate": hidden(N),
            "ffn_down": hidden(N),
            "norm": vector,
            "qk_norm": row("QK-norm gains", lr=inside, eps=L**-α),
            "bias": vector,
            "final_norm": row("final norm"),
            # the fold of CompleteP's row by c = 1/m_N, and eps/c is why its eps does not move (docs/why/fold.md)
            "head": row("unembedding, no multiplier", std=N**-1, lr=N**-1, wd=N),
        },
        residual_multiplier=L**-α,
        one_minus_beta=run.one_minus_beta,
        betas=run.betas,
        run=run,
        routed=False,
        refuses={
            "moe": "Complete(d)P as published has no answer for experts (use complete-mue)",
            "expansion": FIXED_RATIO.replace("CompleteP", "Complete(d)P"),
            "tied": "Complete(d)P scales the head's init and rate, which a tied head shares with the embedding:"
            " use completep or complete-mue, whose multiplier can stay on the logits",
        },
        gradient=True,
        spectral=True,
    )
