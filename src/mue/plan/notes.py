"""What a reader of a plan must know beyond its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mue.plan import per_role
from mue.plan.ratios import base_block
from mue.rules.algebra import Monomial
from mue.rules.laws.law import OutsideRangeError, get_law
from mue.rules.roles import ROLES
from mue.rules.sde import HORIZON, kept_and_lost
from mue.rules.table import CELLS, FIELDS, Rule
from mue.shapes import Block, HParams, Training, Transformer
from mue.shapes.hparams import warmup_steps
from mue.util.text import number, percent


def notes(
    rule: Rule,
    base: Transformer,
    target: Transformer,
    tuned: HParams,
    ratio: Mapping[str, float],
    *,
    planned_base: bool,
) -> tuple[str, ...]:
    """What a reader of this plan must know beyond its numbers, each thing once.

    Args:
        ratio: of any block; only batch and duration are read from it. planned_base: the base is a plan, so its R is known to be right.
    """
    found = [*rule.notes, *_given_up(rule, ratio), *per_role.notes(tuned, rule, base, target)]
    R = base_block(base).route_scale
    if rule.routed and R != 1 and not planned_base:
        found.append(
            f"the base is a MoE, so this takes it as tuned with R = {R:g} on its normalised routed sum; if it was tuned with"
            f" R = 1, give output_multiplier = {base.output_multiplier / R:g} (routed experts only), or tune it again"
        )
    # one tensor has one row, and the embedding's is the one that reads no sum
    if target.tied and _factors(rule, "head") != _factors(rule, "embedding"):
        found.append("tied embeddings: the embedding row wins, and the head multiplier stays on the logits")
    found += _unknown_cells(rule, target)
    # GQA-µP, 2605.15290: it matters only where the ratio changes
    if base.num_heads * target.num_kv_heads != target.num_heads * base.num_kv_heads:
        found.append("the ratio of kv heads to heads changes: no rule here scales k and v for it (GQA-µP, 2605.15290)")
    found += _unscaled(base, target)
    if base.gated != target.gated:
        found.append(
            "gated and plain feed-forwards differ between base and target: no rule covers the change of activation"
        )
    for block in target.blocks:
        # docs/why/index.md#gates
        kind = block.router_kind
        if block.active == 1 and block.experts > 1 and block.exact_sum and kind.matrix and kind.mean_active is None:
            found.append(
                "a = 1 with normalised gates: the one weight is always 1, so the router gets no gradient from the task"
            )
        if block.pools:
            found.append(_of_pools(base, block))
        if block.moments is not None:
            found.append(
                f"{'measured' if block.gate_moments else kind.name} gates: F = {block.gate_variance:.4g}, R = ā/m1 = {block.route_scale:.4g}, down init × κ^-1/2 = {block.kappa**-0.5:.4g}"
            )
    return tuple(dict.fromkeys(found))


def _of_pools(base: Transformer, block: Block) -> str:
    """What sharing experts among layers does to a transfer: their share of the tokens, and so the noise of their steps."""
    share, before = block.share, base_block(base).share
    return (
        f"{block.readers} layers read each pool of {block.experts} experts, which see {block.readers}·a/N = {share:.4g} visits per token"
        f" (the base's weights {before:.4g}): by the SDE their lr and weight decay do not follow the share, and σ0 of their steps is"
        f" × {(share / before) ** -0.5:.4g} for it, reported and not corrected"
    )


# Part of a run that an average of Adam's over 1/(1-β) steps may last, for β1 and β2. In byte models of 240 to 2,400 steps β1's
# cost nothing below 0.9 %, 0.01 to 0.05 nats at 1.7 % and 0.06 to 0.1 at 3 to 4 %; β2's 0.01 at 17 % (docs/LOG.md, "Betas
# and the length of a run").
LONGEST = (0.01, 0.1)
# Laws that a plan asks by name: to ask all there are, plugins too, would cost every plan a look at all installed packages.
CRITICAL_BATCHES = ("power-lines", "zhang")
ADAMS = ("adamw", "adamw-independent", "adam-l2", "nadamw")


def long_averages(betas: tuple[float, float], steps: int) -> str:
    """Which of Adam's averages last long for a run, in words; empty where none does.

    Args:
        betas: of the run. steps: its length.
    """
    found = [
        f"1/(1-β{i}) = {number(1 / (1 - beta))} steps are {percent(100 / (1 - beta) / steps)} % of {steps:,} (a run bears {100 * longest:g} %)"
        for i, (beta, longest) in enumerate(zip(betas, LONGEST, strict=True), start=1)
        if 1 / (1 - beta) > longest * steps * (1 + 1e-9)
    ]
    return ", ".join(found)


def betas_notes(
    optimizer: str,
    base: tuple[tuple[float, float], Training | None],
    target: tuple[tuple[float, float], Training | None],
) -> tuple[str, ...]:
    """A warning where the betas of the base or of the target are long for its run: nobody tuned them there.

    Args:
        optimizer: of both. base, target: the betas and the run of each.
    """
    if optimizer not in ADAMS:
        return ()
    on_base, on_target = (long_averages(betas, run.steps) if run else "" for betas, run in (base, target))
    found = []
    if on_base:
        found.append(
            f"the base's run is short for its betas, {on_base}: betas from longer runs do not fit it, and whatever the rule"
            " carries goes on from there; sweep them ([sweep] betas), or train the base for longer"
        )
    if on_target and target != base:
        found.append(
            f"the target's run is short for its betas, {on_target}:"
            + (
                ' they were carried there; see betas = "unchanged"'
                if target[0] != base[0]
                else " train for longer, or tune them"
            )
        )
    return tuple(found)


def warmup_averages(tuned: HParams, beta2: float, training: Training | None) -> tuple[float, float] | None:
    """A run's warmup in steps, and in units of Adam's average over squared gradients, 1/(1-β2) steps.

    Args:
        tuned: its warmup and optimizer. beta2: of the run. training: its length.

    Returns:
        None where there is no such average, or no run.
    """
    if tuned.optimizer not in ADAMS or training is None:
        return None
    steps = warmup_steps(tuned.warmup, training.steps)
    return steps, steps * (1 - beta2)


def warmup_notes(tuned: HParams, beta2: float, training: Training | None) -> tuple[str, ...]:
    """A note where the target's warmup is shorter than one average over squared gradients, and one where it is the whole run.

    Args:
        tuned: as carried to the target. beta2: the target's. training: the target's run.
    """
    found = warmup_averages(tuned, beta2, training)
    if found is None or training is None:
        return ()
    steps, averages = found
    if steps >= training.steps > 1:
        return (f"warmup = {number(steps)} steps is the target's whole run: give fewer, or a fraction of it",)
    if averages >= 1 - 1e-9:
        return ()
    length = math.ceil(1 / (1 - beta2) - 1e-9)
    short = f"of {number(steps)} steps is" if steps else "is missing, and so"
    return (
        f"the target's lr warmup {short} shorter than Adam's average over squared gradients, 1/(1-β2) = {number(1 / (1 - beta2))} steps: the"
        f" highest rate meets a denominator of few gradients; warmup = {length} (steps) or more is one average",
    )


def _unscaled(base: Transformer, target: Transformer) -> list[str]:
    """What the two shapes differ in and no rule reads: tokens of another kind, windows of another length, a head of its own."""
    changes = [
        f"{name} {getattr(base, name)} → {getattr(target, name)}"
        for name in ("vocab", "sequence", "tied", "image")
        if getattr(base, name) != getattr(target, name)
    ]
    return [f"{', '.join(changes)}: no rule covers that, and values stay as tuned on the base"] if changes else []


def batch_notes(*runs: tuple[str, Training | None, Transformer]) -> tuple[str, ...]:
    """A question where a batch, which is in tokens, holds no whole sequence: whoever counts sequences is off by their length.

    Args:
        runs: which run it is in words, its numbers, and the shape it trains.
    """
    return tuple(
        f"the {name}'s batch of {run.batch:,} tokens is less than one sequence of {shape.sequence:,}: does it count sequences? Then"
        f" give batch = {run.batch * shape.sequence:,} (or the sequence, if it is shorter)"
        for name, run, shape in runs
        if run is not None and run.batch < shape.sequence
    )


def _given_up(rule: Rule, ratio: Mapping[str, float]) -> list[str]:
    """What of the base's run a choice of exponents, weight decay, eps and betas does not keep, and what was measured of it."""
    if rule.run is None or all(change(ratio) == 1 for change in rule.run.changes().values()):
        return []
    why = f" ({', '.join(rule.run.measured)}, as measured: {HORIZON})" if rule.run.measured else ""
    return [f"batch and duration{why}: {kept_and_lost(rule.run, ratio)}"]


def far_batch_notes(rule: Rule, ratio: Mapping[str, float], training: Training | None) -> tuple[str, ...]:
    """A warning where rates grow with a batch that lies far above the best one for the run's tokens.

    Args:
        rule: as it reads for the optimizer. ratio: of any block; only the batch is read from it. training: the target's run.
    """
    if training is None or ratio["ρ_B"] <= 1:
        return ()
    # Of the lowest loss by the fit of 2503.04715, also outside its range: its public runs bend there (docs/findings/public-runs.md).
    best = get_law("step-law").sets["batch"].of({"D": training.tokens})
    # an octave above it: nearer the runs behind the fit do not tell
    if training.batch <= 2 * best or not any(row.lr.exponent("ρ_B") > 0 for row in rule.rows.values()):
        return ()
    return (
        f"the target's batch of {training.batch:,} tokens is {number(training.batch / best)} times what Step Law's fit has as best for"
        f" {training.tokens:,} tokens (0.58·D^0.571 = {best:,.0f}; 2503.04715): beyond it the best rate follows the batch"
        " hardly (as B^0.05 in its dense runs, B^0.29 in its MoE runs), so try a lower rate as well (docs/findings/public-runs.md)",
    )


def critical_batch_notes(base: Training | None, target: Transformer, training: Training | None) -> tuple[str, ...]:
    """A warning where the target's batch passes the critical one: as measured, else by the laws that were fitted to such models.

    Args:
        base: the base's run. target, training: the target and its run.
    """
    if training is None:
        return ()
    found = [
        f"{critical:,.0f} tokens {whose}"
        for critical, whose in _critical_batches(base, target, training)
        if training.batch > critical
    ]
    if not found:
        return ()
    return (
        f"the target's batch of {training.batch:,} tokens passes its critical batch, {' and '.join(found)}: beyond it more tokens in a"
        " step save few steps (1812.06162); train for longer on smaller ones, or measure it (mue noise)",
    )


def _critical_batches(base: Training | None, target: Transformer, training: Training) -> Iterator[tuple[float, str]]:
    """What is known of a run's critical batch, in tokens, and from where: the nearest measurement alone, or every law that answers."""
    law = get_law("power-lines").sets["critical batch"]
    if training.critical_batch is not None:
        yield training.critical_batch, "as measured"
    elif base is not None and base.critical_batch is not None:
        grown = law.of({"D": training.tokens}) / law.of({"D": base.tokens})
        yield base.critical_batch * grown, f"as measured on the base, × ρ_D^{law.exponents['D']:g} (2505.13738)"
    else:
        for name in CRITICAL_BATCHES:
            power = get_law(name).sets["critical batch"]
            try:
                yield power.at(target, training), f"by {name}, {power.note}"
            except OutsideRangeError:
                continue


def _factors(rule: Rule, role: str) -> list[Monomial]:
    return [getattr(rule.rows[role], cell) for cell in FIELDS]


def _unknown_cells(rule: Rule, target: Transformer) -> list[str]:
    counts = target.counts()
    unknown: dict[str, list[str]] = {}
    for role in ROLES:
        row = rule.rows.get(role)
        for cell in row.unknown if row is not None and counts.get(role) else ():
            unknown.setdefault(cell, []).append(role)
    return [
        f"{rule.name} gives no {CELLS[cell]} for {', '.join(roles)}: left as tuned, and marked '?'"
        for cell, roles in unknown.items()
    ]
