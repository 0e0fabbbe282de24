"""Complete-muE (Peng et al., arXiv 2605.23893), the form we recommend.

The authors' table in ratio form, with the four places where we differ from it: the head (their table counts the
width factor twice), weight decay under width (they leave it unscaled), Adam's eps (their table is silent), and
batch and duration, where their Table 2, the SDE rule, is contradicted by what was measured: rates go with the batch as
ρ_B^0.35 and not with the tokens, weight decay and betas stay as tuned (docs/findings/horizon.md, public-runs.md). The SDE
rule is there by the options of :data:`mue.rules.SDE`. Depth as in CompleteP (2505.01618, Table 1).

    FFN/MoE branch: y = l^-α · A · ( R · Σ π_i E_i(x) + Σ S_k(x) ),  A = A*/ρ_e,  R = a,  Σ π_i = 1
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind, of_part
from mue.rules.sde import AXIS_SOURCES, HORIZON, RunFactors, sde
from mue.rules.table import FIELDS, INFERRED, PUBLISHED, Row, Rule

d, o, L, e, κ = (ratio(f"ρ_{x}") for x in ("d", "o", "L", "e", "κ"))
UP_GATE = (e / κ) ** "1/2"  # the drift of docs/why/limits.md: what the update of up and gate grows by when H_act/d does
ROUTER_BIAS = Row(source="not an optimizer parameter; update speed unchanged (2408.15664)")
# weight_decay_width → the power of width on a hidden matrix's weight decay, and who says so
DECAYS = {
    "constant-product": (Fraction(1), "constant product, docs/why/index.md#weight-decay"),
    "sqrt-width": (Fraction(1, 2), "√width, 2510.15262"),
    "none": (Fraction(0), "unscaled, the authors' table"),
}


@dataclass(frozen=True)
class _Hidden:
    """The rows of matrices inside blocks: all of them are µP on their own fan-in, and CompleteP in depth.

    ``depth`` and ``depth_eps`` are the depth's factors on rates and on eps, ``run`` has those of batch and duration, ``decay``
    is the power of width on weight decay.
    """

    depth: Monomial
    depth_eps: Monomial
    run: RunFactors
    decay: Fraction
    decay_source: str

    def row(
        self, fan_in: Monomial, source: str, *, std: Monomial = ONE, eps: Monomial = ONE, rate: Monomial = ONE
    ) -> Row:
        """One matrix; ``std``, ``eps`` and ``rate`` are what it has beyond its fan-in."""
        return Row(
            # a sum of fan_in terms drawn at random keeps its size (µP, 2203.03466)
            init_std=fan_in ** "-1/2" * std,
            # Adam moves each element by lr; fan_in such moves are aligned with the input and add up (µP)
            lr=fan_in**-1 * self.depth * rate * self.run.lr,
            # lr·wd as on the base, for AdamW averages over 1/(lr·wd) steps (2405.13698)
            weight_decay=(fan_in / rate) ** self.decay * self.run.weight_decay,
            # eps stands beside √v and follows the gradient, which falls with all three (docs/why/index.md#adams-eps)
            eps=eps * fan_in**-1 * self.depth_eps * self.run.eps,
            source=f"{source}; lr and std: Table 1; wd: {self.decay_source}; eps: CompleteP Table 1, derived",
            cells={
                "init_std": f"arXiv 2605.23893 Table 1: {source}",
                "lr": f"arXiv 2605.23893 Table 1: {source}",
                "weight_decay": self.decay_source,
                "eps": "CompleteP 2505.01618 Table 1; gradient scales, docs/why/index.md#adams-eps",
            },
            marks={
                "init_std": PUBLISHED,
                # the published table has neither the correction of up and gate nor a width in weight decay
                "lr": INFERRED if rate != ONE else PUBLISHED,
                "weight_decay": INFERRED if self.decay else PUBLISHED,
                **dict.fromkeys(self.run.chosen, INFERRED),
            },
        )


@RULES.register("complete-mue", place=1)
def complete_mue(
    depth_exponent: Fraction = Fraction(1),
    duration_exponent: Fraction = Fraction(0),
    weight_decay_width: str = "constant-product",
    head: str = "completep",
    betas: str = "unchanged",
    up_gate_correction: bool = False,
    *,
    batch_exponent: Fraction = Fraction(7, 20),
    weight_decay_run: str = "unchanged",
    eps_run: str = "follows-lr",
) -> Rule:
    """The recommended rule; every option is a row of :data:`mue.rules.options.OPTIONS`."""
    run = sde(batch_exponent, duration_exponent, weight_decay_run, eps_run, betas)
    inside, inside_eps = L ** (depth_exponent - 1), L**-depth_exponent
    hidden = _Hidden(inside, inside_eps, run, *DECAYS[weight_decay_width])
    up, up_gate = _up(hidden, up_gate_correction)
    vector = Row(lr=inside * run.lr, eps=inside_eps / d * run.eps, source="CompleteP Table 1")
    return Rule(
        name="complete-mue",
        title="Complete-muE, recommended form",
        source="arXiv 2605.23893, Table 1; depth 2505.01618; head, weight decay and eps as in CompleteP; batch and duration as"
        f" measured, {HORIZON} (Table 2, the SDE rule, by its options)",
        rows={
            # A token reads one row, no sum over a width: std and lr stay (CompleteP). Its gradient
            # does fall with width, hence eps (Complete(d)P's correction of CompleteP, 2512.22382).
            "embedding": Row(
                lr=run.lr,
                weight_decay=run.weight_decay,
                eps=run.eps / d,
                source="CompleteP Table 1",
            ),
            **dict.fromkeys(of_kind("attention"), hidden.row(d, "width µP")),
            # o alone reads heads·d_head numbers, not d (docs/why/index.md#width)
            "attention_o": hidden.row(o, "width µP on the fan-in heads·d_head"),
            **dict.fromkeys(of_part("up", "gate"), up),
            # Routed, shared and dense alike. The branch's variance A²·H_act·σ² stays, for A = A*/ρ_e and σ ∝ √ρ_e
            # (docs/why/index.md#active-width); κ is that of gates that do not sum to one. lr has no factor beyond width,
            # for A·R weighs the a·h terms that move down to d. The gradient of W_down goes as d/H_act: eps.
            **dict.fromkeys(
                of_part("down"),
                hidden.row(
                    d, "σ_down = √(H_act/d)·σ^(1), lr unchanged by a, N, h", std=e ** "1/2" * κ ** "-1/2", eps=e**-1
                ),
            ),
            # conservative in eps: its measured gradient falls only as r^-0.3 to r^-0.5
            "router": hidden.row(d, "like any d-controlled projection"),
            "router_bias": ROUTER_BIAS,
            "norm": vector,
            # all heads share this gain, so its gradient does not shrink with width as others' do (2512.22382)
            "qk_norm": Row(
                lr=inside * run.lr,
                eps=inside_eps * run.eps,
                source="Complete(d)P Table 1: gain shared by heads, eps without width",
            ),
            "bias": vector,
            "final_norm": Row(
                lr=run.lr, eps=run.eps / d, source="CompleteP Table 1; eps with the head multiplier outside it"
            ),
            "head": _head(head, run),
        },
        output_multiplier=e**-1,
        residual_multiplier=L**-depth_exponent,
        head_multiplier=d**-1,
        one_minus_beta=run.one_minus_beta,
        betas=run.betas,
        run=run,
        up_gate=up_gate,
        # its eps cells are gradient scales (docs/why/index.md#adams-eps): other optimizers are derived from them
        gradient=True,
        spectral=True,
        axes=AXIS_SOURCES,
    )


def _up(hidden: _Hidden, corrected: bool) -> tuple[Row, Monomial]:
    """The row of up and gate, and the drift of their update that is left."""
    if not corrected:
        # their gradient goes as √(d/H_act) (docs/why/index.md#adams-eps)
        return hidden.row(d, "width µP, no MoE factor", eps=e ** "-1/2"), UP_GATE
    source = "width µP, lr × (ρ_e/ρ_κ)^-1/2: experimental correction of the drift"
    return hidden.row(d, source, eps=e ** "-1/2", rate=UP_GATE**-1), ONE


def _head(form: str, run: RunFactors) -> Row:
    """With the head multiplier 1/ρ_d alone (CompleteP), or, as in the authors' table, both width factors as well."""
    if form == "paper":
        source = "arXiv 2605.23893 Table 1: both width factors and the multiplier (docs/why/index.md#the-head)"
        return Row(init_std=d ** "-1/2", lr=run.lr / d, weight_decay=run.weight_decay, eps=run.eps / d, source=source)
    source = "CompleteP Table 1 (the authors' table differs: docs/why/index.md#the-head)"
    return Row(lr=run.lr, weight_decay=run.weight_decay, eps=run.eps / d, source=source)


@RULES.register("complete-mue-paper", place=2)
def complete_mue_paper(
    depth_exponent: Fraction = Fraction(1),
    *,
    batch_exponent: Fraction = Fraction(1, 2),
    duration_exponent: Fraction = Fraction(1, 2),
    weight_decay_run: str = "follows-lr",
    eps_run: str = "follows-lr",
    betas: str = "linear",
) -> Rule:
    """The authors' published table to the letter, in ratio form: differs in head, weight decay and eps."""
    run, inside = sde(batch_exponent, duration_exponent, weight_decay_run, eps_run, betas), L ** (depth_exponent - 1)
    # what the options change is no longer the published table
    status = INFERRED if run.chosen else PUBLISHED
    marks = dict.fromkeys(FIELDS, PUBLISHED) | dict.fromkeys(run.chosen, INFERRED)

    def hidden(fan_in: Monomial, source: str, std: Monomial = ONE) -> Row:
        return Row(
            init_std=fan_in ** "-1/2" * std,
            lr=fan_in**-1 * inside * run.lr,
            weight_decay=run.weight_decay,  # no factor of width, so that lr·wd falls by 1/ρ_d
            eps=run.eps,  # batch and duration only: the table says nothing of width
            source=f"{source}; batch/duration Table 2",
            status=status,
            marks=marks,
        )

    def vector(lr: Monomial, source: str = "not given by the table; CompleteP") -> Row:
        return Row(lr=lr, weight_decay=run.weight_decay, eps=run.eps, source=source, status=INFERRED)

    down = hidden(d, "Table 1, √(H_act/d) on the init, lr unchanged by a, N, h", e ** "1/2" * κ ** "-1/2")
    return Rule(
        name="complete-mue-paper",
        title="Complete-muE, the authors' published table",
        source="arXiv 2605.23893, Tables 1 and 2; depth deferred to CompleteP, 2505.01618",
        rows={
            "embedding": vector(run.lr, "not given by the table, left unscaled; batch/duration Table 2"),
            **dict.fromkeys(of_kind("attention"), hidden(d, "Table 1, width factors")),
            "attention_o": hidden(o, "Table 1, width factors"),
            **dict.fromkeys(of_part("up", "gate"), hidden(d, "Table 1, width factors only")),
            **dict.fromkeys(of_part("down"), down),
            "router": hidden(d, "Table 1, like any d-controlled projection"),
            "router_bias": ROUTER_BIAS,
            "norm": vector(inside * run.lr),
            "qk_norm": vector(inside * run.lr),
            "bias": vector(inside * run.lr),
            "final_norm": vector(run.lr),
            "head": Row(
                init_std=d ** "-1/2",
                lr=run.lr / d,
                weight_decay=run.weight_decay,
                eps=run.eps,
                source="Table 1: both width factors and the forward multiplier",
                status=status,
                marks=marks,
            ),
        },
        output_multiplier=e**-1,
        residual_multiplier=L**-depth_exponent,
        head_multiplier=d**-1,
        one_minus_beta=run.one_minus_beta,
        betas=run.betas,
        run=run,
        up_gate=UP_GATE,
        axes=AXIS_SOURCES,
        notes=(
            "the published head row scales the logit update by 1/ρ_d; lr·weight_decay of hidden weights falls by 1/ρ_d",
        ),
    )
