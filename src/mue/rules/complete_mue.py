"""Complete-muE (Peng et al., arXiv 2605.23893), the form we recommend.

The authors' table in ratio form, with the three places where we differ from it: the head (their table counts the
width factor twice: W1), weight decay under width (they leave it unscaled: W2), and Adam's eps (their table is silent).
Depth as in CompleteP (2505.01618, Table 1), batch and duration as in the SDE rule (their Table 2).

    FFN/MoE branch: y = l^-α · A · ( R · Σ π_i E_i(x) + Σ S_k(x) ),  A = A*/ρ_e,  R = a,  Σ π_i = 1
"""

from __future__ import annotations

from fractions import Fraction

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.sde import AXIS_SOURCES, horizon_note, sde
from mue.rules.table import INFERRED, PUBLISHED, Row, Rule

d, o, L, e, κ, B, D = (ratio(f"ρ_{x}") for x in ("d", "o", "L", "e", "κ", "B", "D"))
UP_GATE = (e / κ) ** "1/2"  # the drift of 1.9: what the update of up and gate grows by when H_act/d does
WIDTH_POWER = {"constant-product": Fraction(1), "sqrt-width": Fraction(1, 2), "none": Fraction(0)}


@RULES.register("complete-mue", place=1)
def complete_mue(
    depth_exponent: Fraction = Fraction(1),
    duration_exponent: Fraction = Fraction(1, 2),
    weight_decay_width: str = "constant-product",
    head: str = "completep",
    betas: str = "linear",
    up_gate_correction: bool = False,
) -> Rule:
    """The recommended rule; every option is a row of :data:`mue.rules.options.OPTIONS`."""
    α = depth_exponent
    depth_lr, depth_eps = L ** (α - 1), L**-α
    s = sde(duration_exponent)
    decay = WIDTH_POWER[weight_decay_width]
    decay_source = {
        "constant-product": "constant product, W2",
        "sqrt-width": "√width, 2510.15262",
        "none": "unscaled, the authors' table",
    }[weight_decay_width]

    def hidden(fan_in: Monomial, source: str, *, std: Monomial = ONE, eps: Monomial = ONE, rate: Monomial = ONE) -> Row:
        return Row(
            init_std=fan_in ** "-1/2" * std,
            lr=fan_in**-1 * depth_lr * rate * s,
            weight_decay=(fan_in / rate) ** decay * s,
            eps=eps * fan_in**-1 * depth_eps / s,
            source=f"{source}; lr and std: Table 1; wd: {decay_source}; eps: CompleteP Table 1 and 1.9",
            cells={
                "init_std": f"arXiv 2605.23893 Table 1: {source}",
                "lr": f"arXiv 2605.23893 Table 1: {source}",
                "weight_decay": decay_source,
                "eps": "CompleteP 2505.01618 Table 1; gradient scales of transfer-rules 1.9",
            },
            marks={
                "init_std": PUBLISHED,
                "lr": INFERRED if rate != ONE else PUBLISHED,
                "weight_decay": PUBLISHED if weight_decay_width == "none" else INFERRED,
            },
        )

    attention = hidden(d, "width µP")
    corrected = UP_GATE**-1 if up_gate_correction else ONE
    up = hidden(
        d,
        "width µP, "
        + ("lr × (ρ_e/ρ_κ)^-1/2: experimental correction of 1.9" if up_gate_correction else "no MoE factor"),
        eps=e ** "-1/2",
        rate=corrected,
    )
    down = hidden(d, "σ_down = √(H_act/d)·σ^(1), lr unchanged by a, N, h", std=e ** "1/2" * κ ** "-1/2", eps=e**-1)
    return Rule(
        name="complete-mue",
        title="Complete-muE, recommended form",
        source="arXiv 2605.23893, Tables 1 and 2; depth 2505.01618; head, weight decay and eps as in CompleteP",
        rows={
            "embedding": Row(lr=s, weight_decay=s, eps=1 / (d * s), source="CompleteP Table 1; batch/duration Table 2"),
            "attention_q": attention,
            "attention_k": attention,
            "attention_v": attention,
            "attention_o": hidden(o, "width µP on the fan-in heads·d_head"),
            "ffn_up": up,
            "ffn_gate": up,
            "ffn_down": down,
            "expert_up": up,
            "expert_gate": up,
            "expert_down": down,
            "shared_up": up,
            "shared_gate": up,
            "shared_down": down,
            "router": hidden(d, "like any d-controlled projection"),
            "router_bias": Row(source="not an optimizer parameter; update speed unchanged (2408.15664)"),
            "norm": Row(lr=depth_lr * s, eps=depth_eps / (d * s), source="CompleteP Table 1"),
            "qk_norm": Row(
                lr=depth_lr * s,
                eps=depth_eps / s,
                source="Complete(d)P Table 1: gain shared by heads, eps without width",
            ),
            "bias": Row(lr=depth_lr * s, eps=depth_eps / (d * s), source="CompleteP Table 1"),
            "final_norm": Row(
                lr=s, eps=1 / (d * s), source="CompleteP Table 1; eps with the head multiplier outside it"
            ),
            "head": Row(
                init_std=d ** "-1/2" if head == "paper" else ONE,
                lr=s / d if head == "paper" else s,
                weight_decay=s,
                eps=1 / (d * s),
                source="arXiv 2605.23893 Table 1: both width factors and the multiplier (W1)"
                if head == "paper"
                else "CompleteP Table 1 (W1: the authors' table differs)",
            ),
        },
        output_multiplier=e**-1,
        residual_multiplier=L**-α,
        head_multiplier=d**-1,
        one_minus_beta=s**2,
        betas=betas,
        up_gate=UP_GATE * corrected,
        notes=horizon_note(duration_exponent),
        gradient=True,
        spectral=True,
        axes=AXIS_SOURCES,
    )


@RULES.register("complete-mue-paper", place=2)
def complete_mue_paper(depth_exponent: Fraction = Fraction(1)) -> Rule:
    """The authors' published table to the letter, in ratio form: differs in head, weight decay and eps."""
    recommended = complete_mue(depth_exponent)
    α, s = depth_exponent, sde(Fraction(1, 2))
    depth_lr = L ** (α - 1)

    def hidden(fan_in: Monomial, source: str, std: Monomial = ONE, status: str = PUBLISHED) -> Row:
        return Row(
            init_std=fan_in ** "-1/2" * std,
            lr=fan_in**-1 * depth_lr * s,
            weight_decay=s,
            eps=1 / s,
            source=f"{source}; batch/duration Table 2",
            status=status,
        )

    def vector(lr: Monomial, source: str) -> Row:
        return Row(lr=lr, weight_decay=s, eps=1 / s, source=source, status=INFERRED)

    attention = hidden(d, "Table 1, width factors")
    up = hidden(d, "Table 1, width factors only")
    down = hidden(d, "Table 1, √(H_act/d) on the init, lr unchanged by a, N, h", e ** "1/2" * κ ** "-1/2")
    return Rule(
        name="complete-mue-paper",
        title="Complete-muE, the authors' published table",
        source="arXiv 2605.23893, Tables 1 and 2; depth deferred to CompleteP, 2505.01618",
        rows={
            "embedding": vector(s, "not given by the table, left unscaled; batch/duration Table 2"),
            "attention_q": attention,
            "attention_k": attention,
            "attention_v": attention,
            "attention_o": hidden(o, "Table 1, width factors"),
            "ffn_up": up,
            "ffn_gate": up,
            "ffn_down": down,
            "expert_up": up,
            "expert_gate": up,
            "expert_down": down,
            "shared_up": up,
            "shared_gate": up,
            "shared_down": down,
            "router": hidden(d, "Table 1, like any d-controlled projection"),
            "router_bias": recommended.rows["router_bias"],
            "norm": vector(depth_lr * s, "not given by the table; CompleteP"),
            "qk_norm": vector(depth_lr * s, "not given by the table; CompleteP"),
            "bias": vector(depth_lr * s, "not given by the table; CompleteP"),
            "final_norm": vector(s, "not given by the table; CompleteP"),
            "head": Row(
                init_std=d ** "-1/2",
                lr=s / d,
                weight_decay=s,
                eps=1 / s,
                source="Table 1: both width factors and the forward multiplier (W1)",
                status=PUBLISHED,
            ),
        },
        output_multiplier=e**-1,
        residual_multiplier=L**-α,
        head_multiplier=d**-1,
        one_minus_beta=s**2,
        up_gate=UP_GATE,
        axes=AXIS_SOURCES,
        notes=(
            "the published head row scales the logit update by 1/ρ_d (W1); lr·weight_decay of hidden weights falls by 1/ρ_d (W2)",
        ),
    )
