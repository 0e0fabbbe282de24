"""Batch and duration: by how much lr, weight decay, eps and betas move with the run, and what stays the same by that.

    s = ρ_B^p · ρ_D^-q        p = q = 1/2 is the SDE rule: s = √(ρ_B/ρ_D) = √(T*/T); p = 7/20, q = 0 is what was measured

Rates are multiplied by s. Whether the other three follow is a choice of its own for each of them, so that a finding on the lr
moves none of them unmeasured; with p or q ≠ 1/2 no choice keeps everything, and :meth:`RunFactors.changes` says what is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from mue.rules.algebra import ONE, Monomial, ratio

B, D = ratio("ρ_B"), ratio("ρ_D")
T = D / B  # steps
HALF = Fraction(1, 2)
SDE: Mapping[str, Fraction | str] = {
    "batch_exponent": HALF,
    "duration_exponent": HALF,
    "weight_decay_run": "follows-lr",
    "eps_run": "follows-lr",
    "betas": "linear",
}
"""The SDE rule as options, for any rule that has them: ``mue.transfer(..., **mue.rules.SDE)``."""
HORIZON = "docs/findings/horizon.md"
# What public runs and our own have as best, complete-mue's defaults. Of eps nothing was measured: it follows the lr as theory has it.
AS_MEASURED: Mapping[str, Fraction | str] = {
    "batch_exponent": Fraction(7, 20),
    "duration_exponent": Fraction(0),
    "weight_decay_run": "unchanged",
    "betas": "unchanged",
}

AXIS_SOURCES = {
    "ρ_L": "CompleteP 2505.01618 Table 1",
    "ρ_B": "arXiv 2605.23893 Table 2, the SDE rule",
    "ρ_D": "arXiv 2605.23893 Table 2, the SDE rule",
}
# quantity → what it stands for in a training with AdamW, and who says so
INVARIANTS = {
    "T·η²": "how far the training gets, in the time of Adam's SDE (2205.10287)",
    "η·λ·T": "how many of AdamW's averages over weights, 1/(η·λ) steps each, the run lasts (2405.13698)",
    "λ/η": "the size that weights settle at, √(η/λ) (2510.15262)",
    "η·ε": "Adam's eps against the gradient's noise (2205.10287)",
    "(1-β)/η²": "Adam's averages over gradients against the time of its SDE (2205.10287)",
    "(1-β)·T": "the part of the run that Adam's averages over gradients last (2605.23893, Table 2)",
}


@dataclass(frozen=True)
class RunFactors:
    """What a change of batch and duration multiplies the base's values by.

    Attributes:
        lr, weight_decay, eps, one_minus_beta: the factors, monomials in ρ_B and ρ_D alone.
        betas: how the last of them is taken: ``"linear"``: (1-β) times it; ``"power"``: β to its power.
        chosen: lr, weight_decay, eps → what was chosen and by what, for those that are not as the SDE rule has them.
        chosen_betas: the same of betas; empty where they last the same part of the run, as the SDE rule has it.
        measured: the choices that are :data:`AS_MEASURED`, as ``"name = value"``.
    """

    lr: Monomial
    weight_decay: Monomial
    eps: Monomial
    one_minus_beta: Monomial
    betas: str
    chosen: Mapping[str, str]
    chosen_betas: str = ""
    measured: tuple[str, ...] = ()

    def changes(self) -> dict[str, Monomial]:
        """Each of :data:`INVARIANTS` on the target over the base's; 1 where it is kept."""
        return {
            "T·η²": T * self.lr**2,
            "η·λ·T": self.lr * self.weight_decay * T,
            "λ/η": self.weight_decay / self.lr,
            "η·ε": self.lr * self.eps,
            "(1-β)/η²": self.one_minus_beta / self.lr**2,
            "(1-β)·T": self.one_minus_beta * T,
        }


def sde(
    batch_exponent: Fraction = HALF,
    duration_exponent: Fraction = HALF,
    weight_decay_run: str = "follows-lr",
    eps_run: str = "follows-lr",
    betas: str = "linear",
) -> RunFactors:
    """The factors of the run, by the choices of a rule's options (:data:`mue.rules.options.OPTIONS` says what they mean)."""
    s = B**batch_exponent * D**-duration_exponent
    decays = {
        "follows-lr": s,
        # η·λ·T as on the base, whatever η does: λ × (T*/T)/s
        "constant-timescale": 1 / (T * s),
        "unchanged": ONE,
    }
    epsilons = {"follows-lr": 1 / s, "unchanged": ONE}
    averages = {"linear": s**2, "power": s**2, "constant-timescale": 1 / T, "unchanged": ONE}
    options = {
        "batch_exponent": batch_exponent,
        "duration_exponent": duration_exponent,
        "weight_decay_run": weight_decay_run,
        "eps_run": eps_run,
        "betas": betas,
    }

    def said(*names: str) -> str:
        measured = all(AS_MEASURED.get(name) == options[name] for name in names)
        values = ", ".join(f"{name} = {options[name]}" for name in names)
        return f"{values}, {f'as measured: {HORIZON}' if measured else 'as chosen'}"

    chosen: dict[str, str] = {}
    if not batch_exponent == duration_exponent == HALF:
        # what follows a rate that is not the SDE's is not the SDE's either
        chosen = dict.fromkeys(("lr", "weight_decay", "eps"), said("batch_exponent", "duration_exponent"))
    for cell, name in (("weight_decay", "weight_decay_run"), ("eps", "eps_run")):
        if options[name] != SDE[name]:
            chosen[cell] = said(name)
    return RunFactors(
        lr=s,
        weight_decay=decays[weight_decay_run],
        eps=epsilons[eps_run],
        one_minus_beta=averages[betas],
        betas="power" if betas == "power" else "linear",
        chosen=chosen,
        chosen_betas="" if averages[betas] == 1 / T else said("betas"),
        measured=tuple(f"{name} = {value}" for name, value in AS_MEASURED.items() if options[name] == value),
    )


def kept_and_lost(run: RunFactors, ratios: Mapping[str, float] | None = None, among: Collection[str] = ()) -> str:
    """``"keeps η·ε, …; gives up T·η² (× ρ_D^2/5), …"``: what a choice of factors does to the invariants.

    Args:
        run: the factors. ratios: of a plan, for what is given up in it and by how much; None: in general.
        among: which of :data:`INVARIANTS`; none: all.
    """
    kept, lost = [], []
    for name, change in run.changes().items():
        if among and name not in among:
            continue
        if change == ONE or (ratios is not None and change(ratios) == 1):
            kept.append(f"{name} to first order" if run.betas == "power" and "β" in name else name)
        else:
            lost.append(f"{name} (× {change}{'' if ratios is None else f' = {change(ratios):.4g}'})")
    parts = ([f"keeps {', '.join(kept)}"] if kept else []) + ([f"gives up {', '.join(lost)}"] if lost else [])
    return "; ".join(parts)
