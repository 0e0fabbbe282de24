"""What rows say of a claim: the mean of each check over seeds with its interval, and a verdict.

The interval is Student's over paired differences (or ratios) of runs of one seed. A statement *holds* where the whole interval lies on its
side of the bound, *fails* where it lies wholly on the other, and is *undecided* in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claims.spec import Check, Claim, Claims, Value
from mue.util.statistics import Mean, mean_of

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
NOT_MEASURED, NO_POWER, CONTROL = "not measured", "without power", "no verdict: its control does not hold"

Rows = Mapping[str, Mapping[str, Any]]
"""Rows by the identity of their run."""


@dataclass(frozen=True)
class Outcome:
    """One check on the rows there are.

    Attributes:
        mean: over the seeds that have rows; None without any. seeds: how many. verdict: ``HOLDS``, ``FAILS``, ``UNDECIDED``.
    """

    check: Check
    mean: Mean | None
    seeds: int
    verdict: str


@dataclass(frozen=True)
class Judged:
    """A claim with what came out. ``verdict`` is one of this file's constants."""

    claim: Claim
    checks: tuple[Outcome, ...]
    controls: tuple[Outcome, ...]
    verdict: str


def judge(claims: Claims, claim: Claim, rows: Rows) -> Judged:
    """The verdict on a claim: all checks have to hold, and before that all controls.

    One that is undecided with an interval wider than was wanted is *without power*. A claim some of whose runs are missing is *not measured*.
    """
    checks, controls = (
        tuple(_outcome(claims, claim, check, rows) for check in group) for group in (claim.checks, claim.controls)
    )
    if any(outcome.seeds < len(claim.seeds) for outcome in (*checks, *controls)):
        return Judged(claim, checks, controls, NOT_MEASURED)
    verdicts = {outcome.verdict for outcome in checks}
    if any(outcome.verdict != HOLDS for outcome in controls):
        verdict = CONTROL
    elif FAILS in verdicts:
        verdict = FAILS
    elif UNDECIDED in verdicts:
        first = checks[0]
        wide = first.mean is not None and not first.mean.half <= claim.half_width
        verdict = NO_POWER if wide and first.verdict == UNDECIDED else UNDECIDED
    else:
        verdict = HOLDS
    return Judged(claim, checks, controls, verdict)


def _outcome(claims: Claims, claim: Claim, check: Check, rows: Rows) -> Outcome:
    def number(value: Value | float, seed: int) -> float | None:
        if not isinstance(value, Value):
            return value
        row = rows.get(claims.arms[claim.group, value.arm].identity(seed))
        if row is None or value.name not in row["seen"]:
            return None
        seen = row["seen"][value.name]
        return math.inf if seen is None else float(seen)  # None: the run diverged, or what was looked for never came

    samples = []
    for seed in claim.seeds:
        of, other = number(check.of, seed), number(check.other, seed)
        if of is not None and other is not None:
            samples.append(_paired(check.pair, of, other))
    if not samples:
        return Outcome(check, None, 0, UNDECIDED)
    if not all(map(math.isfinite, samples)):
        # one endless value is an endless mean: above every bound where it is +inf, and nothing else is known of it
        sign = {x for x in samples if not math.isfinite(x)}
        value = sign.pop() if len(sign) == 1 else math.nan
        return Outcome(check, Mean(value, 0.0), len(samples), _verdict(check, value, 0.0))
    mean = mean_of(samples)
    return Outcome(check, mean, len(samples), _verdict(check, mean.value, mean.half))


def _paired(pair: str, of: float, other: float) -> float:
    if pair == "minus":
        return of - other
    if pair == "over":
        if math.isinf(other):
            return math.nan  # what it is compared with diverged: nothing is known of the ratio
        return of / other if other else math.copysign(math.inf, of) if of else math.nan
    return of


def _verdict(check: Check, value: float, half: float) -> str:
    """Where the interval lies. ``below`` and ``above`` are strict, so that two arms that are equal to the bit show nothing of the kind; an end on
    the bound is within, so that a quantity that is exactly 0 is within 0 of zero."""
    if math.isnan(value):
        return UNDECIDED
    low, high, bound = value - half, value + half, check.bound
    holds, fails = {
        "below": (high < bound, low >= bound),
        "above": (low > bound, high <= bound),
        "within": (-bound <= low and high <= bound, low > bound or high < -bound),
        "apart": (low > bound or high < -bound, -bound <= low and high <= bound),
    }[check.criterion]
    return HOLDS if holds else FAILS if fails else UNDECIDED
