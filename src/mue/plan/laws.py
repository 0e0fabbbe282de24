"""What fitted laws say of one target: their numbers beside the plan's, their refusals, and their exponents beside the chosen ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mue.plan.base import base_of
from mue.plan.notes import ADAMS
from mue.plan.plan import Inputs, PlanData
from mue.plan.steps import Step
from mue.rules.laws.law import LAWS, QUANTITIES, Model, Power, get_law, quantity, span
from mue.rules.table import Rule
from mue.shapes import HParams
from mue.util.text import number


@dataclass(frozen=True)
class Answer:
    """What one law sets for a target.

    Attributes:
        law: its name. sets: ``"lr"``, ``"batch"`` or ``"critical batch"``, which are in tokens. note: whose rate it is.
        value: None where it refuses. times: over the tuned lr, or over the target's batch; None where there is none to compare with.
        refused: why, or ``""``. reference: the tuned rate under ``times``: that of the AdamW beside Muon, ``"tuned adamw_lr"``, where it is Muon's.
    """

    law: str
    sets: str
    note: str
    value: float | None
    times: float | None
    refused: str
    reference: str = "tuned"

    @property
    def text(self) -> str:
        """As a line of a table has it."""
        if self.value is None:
            return f"refuses: {self.refused}"
        if self.sets == "lr":
            times = "" if self.times is None else f" = {number(self.times)} × {self.reference}"
            return f"{number(self.value)}{times}; {self.note}"
        times = "" if self.times is None else f" = {number(self.times)} × the target's"
        return f"{self.value:,.0f} tokens{times}"


def answers(inputs: Inputs) -> list[Answer]:
    """Every law on one target, number by number."""
    base, first = base_of(inputs), inputs
    # on a plan as base a run that is not given is the base's
    target = (inputs.target, inputs.training or base.training)
    # the rate was tuned where a chain of plans begins, and not on the last of them
    while isinstance(first.base, PlanData):
        first = first.base.inputs
    models = ((first.base, first.base_training), target)
    return [
        _answer(name, sets, power, *models, base.tuned) for name in LAWS for sets, power in get_law(name).sets.items()
    ]


def _answer(name: str, sets: str, power: Power, base: Model, target: Model, tuned: HParams) -> Answer:
    run = target[1]
    try:
        value = _value(power, base, target, tuned)
    except ValueError as error:
        return Answer(name, sets, power.note, None, None, str(error))
    if sets != "lr":
        return Answer(name, sets, power.note, value, None if run is None else value / run.batch, "")
    # the rates are Adam's, and those of another optimizer are on another scale
    own = tuned.optimizer in ADAMS
    rate = tuned.lr if own else tuned.adamw_lr
    reference = "tuned" if own else "tuned adamw_lr"
    return Answer(name, sets, power.note, value, None if rate is None else value / rate, "", reference)


def _value(power: Power, base: Model, target: Model, tuned: HParams) -> float:
    """The law's own number; of one whose units are unknown the tuned value times its ratio, if the base is in its range as well."""
    if power.constant is not None:
        return power.at(*target)
    if tuned.optimizer not in ADAMS:
        raise ValueError(f"ratios only, of AdamW's rate, and the plan's optimizer is {tuned.optimizer!r}")
    power.inside(*target)
    try:
        power.inside(*base)
    except ValueError as error:
        raise ValueError(f"ratios only; base {error}") from None
    return tuned.lr * power.ratio(base, target)


def derivation(inputs: Inputs, name: str) -> Iterator[Step]:
    """A law with its constants, what it reads of the target, its range and its answer."""
    law, target = get_law(name), (inputs.target, inputs.training or base_of(inputs).training)
    found = {answer.sets: answer for answer in answers(inputs) if answer.law == name}
    for sets, power in law.sets.items():
        note = f" ({power.note})" if power.note else ""
        yield Step(sets, f"{power.formula}, {law.title}{note}", power.constant, law.source)
        for symbol in dict.fromkeys((*power.exponents, *power.ranges)):
            fitted = f"fitted for {span(power.ranges[symbol])}" if symbol in power.ranges else "no range stated"
            try:
                value = quantity(symbol, *target)
            except ValueError as error:
                yield Step(sets, f"{symbol}: {error}", None, fitted)
                continue
            yield Step(sets, f"{symbol}, {QUANTITIES[symbol].meaning}", value, fitted)
        answer = found[sets]
        yield Step(sets, answer.text, answer.value, f"runs behind it: {law.fitted}")


# ---- exponents of batch and duration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exponents:
    """Somebody's p and q of lr × ρ_B^p · ρ_D^-q (None: not in what they fitted), and the factor they give here."""

    whose: str
    p: float | None
    q: float | None
    factor: float
    source: str


# All cells of 708 public MoE runs with AdamW, fitted by us; within the intervals p = 0.30 to 0.38, q = -0.04 to 0.01.
PUBLIC_RUNS = ("public AdamW runs", 0.34, -0.02, "docs/findings/public-runs.md")


def neighbours(rule: Rule, ratio: Mapping[str, float]) -> list[Exponents]:
    """The rule's exponents and those of others, none where the run does not change.

    Args:
        rule: as planned. ratio: of any block; only batch and duration are read from it.
    """
    B, D = ratio["ρ_B"], ratio["ρ_D"]
    if rule.run is None or (B == 1 and D == 1):
        return []
    own = rule.run.lr
    said: list[tuple[str, float | None, float | None, str]] = [
        (rule.name, float(own.exponent("ρ_B")), 0.0 - float(own.exponent("ρ_D")), "as chosen"),
        ("SDE", 0.5, 0.5, "2205.10287; 2605.23893, Table 2"),
    ]
    for name in LAWS:
        power = get_law(name).sets.get("lr")
        # compute grows with the tokens; a law with neither says nothing of the run
        reads = {} if power is None else power.exponents
        p, q = reads.get("B"), reads.get("D", reads.get("C"))
        if p is not None or q is not None:
            said.append((name, p, None if q is None else -q, get_law(name).source))
    said.append(PUBLIC_RUNS)
    return [Exponents(whose, p, q, B ** (p or 0) * D ** -(q or 0), source) for whose, p, q, source in said]
