"""How a rule's table, written for Adam, reads for another optimizer: derived here, or refused.

A rule fixes what happens to functions: by how much one step moves an element of W (Adam: lr, whatever the gradient),
and by how much it shrinks (torch's AdamW: lr·wd). Another optimizer that makes the same moves trains the same model, so
its lr and weight decay follow from its update, with σ the init std of a weight and γ the scale of its gradient. γ is what
a table's eps cell is (without batch and duration), for eps is compared with nothing but the gradient.

==================  ======================================  ==============  ==================  =========
optimizer           one step moves an element by            lr              weight decay        eps
==================  ======================================  ==============  ==================  =========
adamw, nadamw       lr; shrinks by lr·wd                    η               λ                   ε
lion                lr (a sign); shrinks by lr·wd           η               λ                   has none
adamw-independent   lr; shrinks by wd                       η               η·λ                 ε
adam-l2             lr; wd·W joins the gradient             η               λ·γ                 ε
sgd                 lr·γ; shrinks by lr·wd                  η/γ             λ·γ                 has none
lamb                lr·rms(W); shrinks by lr·rms(W)·wd      η/σ             λ                   ε
adafactor           lr·rms(W); shrinks by lr·wd             η/σ             λ·σ                 ε²
muon, matrices      lr·√(out/in) in operator norm           see below       λ·η/lr              has none
hyperball           lr·‖W‖, back on the sphere of ‖W‖       only rule hyperp
==================  ======================================  ==============  ==================  =========

``muon``: of its matrices lr is ρ_L^(α-1), times ρ_H/(ρ_d·ρ_e·A) in a down projection; embedding, head, routers, gains and biases
keep their AdamW rows. docs/optimizers.md has the derivation, and which row is published. What changes becomes *inferred*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.roles import ROLES, of_kind
from mue.rules.sde import AS_MEASURED, SDE
from mue.rules.table import INFERRED, ZERO_INIT, Row, Rule
from mue.shapes import OPTIMIZERS, HParams
from mue.shapes.hparams import MATRICES
from mue.util.errors import nearest

BOTH = ("adamw", "muon")  # optimizers whose step checks know and stacks have words for
_BATCH = {
    "batch": "{0} under another batch is not derived: the √ rule is Adam's",
    "duration": "{0} over another number of tokens is not derived: the SDE rule is Adam's",
}
_NO_GRADIENT = "it needs the scale of every gradient, and this table's eps does not give it"
# An expert's gradient falls with its share a/N: by the share where signal dominates, its root where noise does
_SHARE = "an expert's gradient falls with its share of the tokens, to a power between 1/2 and 1, and {0} does not normalise it"


def moved_by(optimizer: str, role: str, kinds: Collection[str]) -> str:
    """The optimizer that moves a role: beside Muon, AdamW moves all but the matrices of some kinds.

    Args:
        optimizer: of the run. role: by name. kinds: whose matrices Muon moves (:attr:`mue.shapes.HParams.muon_moves`).
    """
    if optimizer != "muon":
        return optimizer
    return "muon" if ROLES[role].hidden and ROLES[role].kind in kinds else "adamw"


def of_tuned(tuned: HParams, role: str) -> str:
    """:func:`moved_by` of tuned values."""
    return moved_by(tuned.optimizer, role, tuned.muon_moves)


def for_optimizer(rule: Rule, optimizer: str, kinds: Collection[str] = MATRICES[:-1]) -> Rule:
    """The rule as it reads for another optimizer.

    Args:
        optimizer: from :data:`mue.shapes.OPTIMIZERS`. kinds: of the matrices that Muon moves.

    Raises:
        ValueError: an unknown optimizer, or a rule that nobody has derived for it, with the reason.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not understood{nearest(optimizer, OPTIMIZERS)}")
    # what the table was written for needs no derivation
    if rule.optimizer == "any" or (rule.optimizer, optimizer) in {("adam", "adamw"), ("hyperball", "hyperball")}:
        return rule
    if rule.optimizer != "adam" or optimizer == "hyperball":
        written = "AdamW" if rule.optimizer == "adam" else rule.optimizer
        raise ValueError(
            f"rule {rule.name!r} is written for {written}, and how it scales under {optimizer!r} is not derived"
            + (': use rule = "hyperp"' if optimizer == "hyperball" else "")
        )
    return _muon(rule, kinds) if optimizer == "muon" else _DERIVED[optimizer](rule)


def _derived(
    rule: Rule, optimizer: str, change: Callable[[str, Row], Row], kinds: Collection[str] = (), **more: object
) -> Rule:
    """``change`` on every row, marked inferred; cells that are unknown stay so. ``more`` are fields of the rule."""
    why = f"{optimizer}: mue.rules.optimizers"

    def derived(role: str, row: Row) -> Row:
        if moved_by(optimizer, role, kinds) == "adamw":
            return row  # beside Muon: its own table's, and as well known
        made = replace(change(role, row), source=f"{row.source}; {why}", status=INFERRED)
        cells = {cell: f"{text}; {why}" for cell, text in row.cells.items()}
        # a cell that no source gives is not known for this optimizer either, whatever `change` made of it
        unknown: dict[str, Any] = dict.fromkeys(row.unknown, ONE)
        # a draw does not depend on who moves it later: its mark stays
        return replace(made, cells=cells, marks={"init_std": row.mark("init_std")}, **unknown)

    rows = {role: derived(role, row) if ROLES[role].trained else row for role, row in rule.rows.items()}
    return replace(rule, rows=rows, **more)  # type: ignore[arg-type]


def _refuse(rule: Rule, optimizer: str, *axes: dict[str, str]) -> dict[str, str]:
    """What the rule refuses, and what its reading for this optimizer refuses beyond that."""
    new = {axis: reason.format(optimizer) for table in axes for axis, reason in table.items()}
    return {**rule.refuses, **{axis: reason for axis, reason in new.items() if axis not in rule.refuses}}


def _at_one_run(cell: Monomial) -> Monomial:
    """A cell without its batch and duration: γ is the gradient's scale at one run, and the √ rule is Adam's alone."""
    for name in ("ρ_B", "ρ_D"):
        cell = cell / ratio(name) ** cell.exponent(name)
    return cell


def _run_part(cell: Monomial) -> Monomial:
    """What of a cell is batch and duration alone."""
    return cell / _at_one_run(cell)


def _require(rule: Rule, optimizer: str, holds: bool, reason: str) -> None:
    """``ValueError`` with the reason where a derivation asks for what a table does not have."""
    if not holds:
        raise ValueError(f"rule {rule.name!r} under {optimizer!r} is not derived: {reason}")


def _nadamw(rule: Rule) -> Rule:
    """Nesterov's look-ahead changes the average of past gradients, not its scale; independent of every ratio."""
    return _derived(rule, "nadamw", lambda _, row: row)


def _lion(rule: Rule) -> Rule:
    """A sign of an average: ±lr an element as Adam, and the same noise per step; it has no eps."""
    return _derived(rule, "lion", lambda _, row: replace(row, eps=ONE))


def _adamw_independent(rule: Rule) -> Rule:
    """``p *= 1 - wd``: the shrink lr·wd of torch's form is now wd itself."""
    return _derived(rule, "adamw-independent", lambda _, row: replace(row, weight_decay=row.weight_decay * row.lr))


def _adam_l2(rule: Rule) -> Rule:
    """wd·W/√v with √v ∝ γ is a shrink of lr·wd/γ: equal to torch's form for wd = λ·γ, batch and duration included.

    γ moves with the run as 1/s (η·γ is kept as η·ε is), whether or not eps was chosen to follow it.
    """
    _require(rule, "adam-l2", rule.gradient, _NO_GRADIENT)
    refuses = _refuse(rule, "adam-l2", {"sparsity": _SHARE})

    def change(_: str, row: Row) -> Row:
        γ = _at_one_run(row.eps) / _run_part(row.lr)
        return replace(row, weight_decay=row.weight_decay * γ)

    return _derived(rule, "adam-l2", change, refuses=refuses)


def _sgd(rule: Rule) -> Rule:
    """lr·γ must be η, and lr·wd must be η·λ. Momentum 1-β and the rate of a longer run are not settled: refused."""
    _require(rule, "sgd", rule.gradient, _NO_GRADIENT)

    def change(_: str, row: Row) -> Row:
        γ = _at_one_run(row.eps)
        return replace(row, lr=_at_one_run(row.lr) / γ, weight_decay=_at_one_run(row.weight_decay) * γ, eps=ONE)

    return _derived(rule, "sgd", change, refuses=_refuse(rule, "sgd", _BATCH, {"sparsity": _SHARE}))


def _relative(rule: Rule, optimizer: str) -> None:
    """The derivations for steps relative to a weight's size ask for the size it starts with."""
    unknown = any(row.init == ZERO_INIT or "init_std" in row.unknown for row in rule.rows.values())
    reason = "its step is relative to the weight, and this table has a weight without a known init"
    _require(rule, optimizer, not unknown, reason)


_RELATIVE_NOTE = (
    "{0}: a step is relative to the weight, so its factor holds while rms(W) keeps the proportion it had at init"
)


def _lamb(rule: Rule) -> Rule:
    """lr·rms(W) takes Adam's place: lr = η/σ and wd as AdamW's. A gain starts at 1, so σ is 1 there."""
    _relative(rule, "lamb")
    notes = (*rule.notes, _RELATIVE_NOTE.format("lamb"))
    return _derived(rule, "lamb", lambda role, row: replace(row, lr=row.lr / _std(role, row)), notes=notes)


def _adafactor(rule: Rule) -> Rule:
    """As LAMB, but torch shrinks by lr·wd, not by lr·rms(W)·wd; eps1 stands beside the squared gradient; β2 follows t."""
    _relative(rule, "adafactor")

    def change(role: str, row: Row) -> Row:
        σ = _std(role, row)
        lr, wd, γ = (_at_one_run(cell) for cell in (row.lr, row.weight_decay, row.eps))
        return replace(row, lr=lr / σ, weight_decay=wd * σ, eps=γ**2)

    notes = (*rule.notes, _RELATIVE_NOTE.format("adafactor"))
    return _derived(rule, "adafactor", change, notes=notes, refuses=_refuse(rule, "adafactor", _BATCH))


def _std(role: str, row: Row) -> Monomial:
    # a gain starts at 1 at every size (a bias at 0, where a relative step has no size to follow)
    return ONE if ROLES[role].vector else row.init_std


# Who measured an exponent of the run under orthogonal updates, or how it is derived (docs/optimizers.md).
_MUON_RUN = (
    "the exponents of {0}, batch_exponent = {1} and duration_exponent = {2}, were measured with AdamW alone: give others, 1/2 and 1/2"
    " by derivation (**mue.rules.SDE), or 0.5 and 0.32 as 2603.28743 measured for MuonH"
)


def _muon(rule: Rule, kinds: Collection[str]) -> Rule:
    """An orthogonal update times lr·√(out/in) has operator norm lr (RMS to RMS), whatever the width.

    So lr has no width in it; depth stays ρ_L^(α-1), and batch and duration are the options' (a step knows no scale of the
    gradient, as Adam's, which is all that the √ rule asks for). Down projections add up in a branch: A·(R·Σ π_i E_i + Σ S_k) moves
    by A·lr for each shared expert and by A·R·lr for the routed ones together, whose weights average them. With lr ∝ the fan-in,
    (ρ_H/ρ_d)/(ρ_e·A), that is η of the base in sum, whatever the mixture, each expert having a part by its width; without shared
    experts it is 1/c with c = A·R, so that a folded expert needs no a, N or h. Weight decay keeps η·λ; with
    ``weight_decay_width = "none"`` that product falls as 1/width, as 2512.05620 found best.
    """
    _require(rule, "muon", rule.spectral, "only tables with CompleteP's widths and depth carry over")
    down = ratio("ρ_H") / (ratio("ρ_d") * ratio("ρ_e") * rule.output_multiplier)

    def change(role: str, row: Row) -> Row:
        lr = ratio("ρ_L") ** row.lr.exponent("ρ_L") * _run_part(row.lr)
        if ROLES[role].part == "down":
            lr = lr * down
        return replace(row, lr=lr, weight_decay=row.weight_decay * row.lr / lr, eps=ONE)

    refused = {"gates": "measured gates under {0} are not derived"}
    run = {name: rule.options.get(name) for name in ("batch_exponent", "duration_exponent")}
    if all(value is not None and value == AS_MEASURED[name] != SDE[name] for name, value in run.items()):
        refused |= dict.fromkeys(("batch", "duration"), _MUON_RUN.format(rule.name, *run.values()))
    made = _derived(
        rule,
        "muon",
        change,
        kinds,
        up_gate=None,
        refuses=_refuse(rule, "muon", refused),
        notes=(
            *rule.notes,
            "muon: hidden matrices one by one (each expert, each part of a fused tensor), mue.model.muon.Muon does it; AdamW moves"
            " the rest, at adamw_lr",
        ),
    )
    if "expert" in kinds and "shared" not in kinds:  # one branch, two kinds of step
        apart = dict.fromkeys(
            of_kind("shared"), "shared experts are moved by AdamW and routed ones by Muon: nobody derived that sum"
        )
        rows = {role: row for role, row in made.rows.items() if role not in apart}
        made = replace(made, rows=rows, unanswered={**rule.unanswered, **apart})
    return made


_DERIVED: dict[str, Callable[[Rule], Rule]] = {
    "nadamw": _nadamw,
    "lion": _lion,
    "adamw-independent": _adamw_independent,
    "adam-l2": _adam_l2,
    "sgd": _sgd,
    "lamb": _lamb,
    "adafactor": _adafactor,
}
