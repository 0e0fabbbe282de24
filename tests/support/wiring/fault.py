"""A seeded fault: one function that changes a right case, what it breaks, where it is possible, and who has to name it.

A check that only says "something is wrong" sends its user searching, so a fault counts as found where a failing finding names the
tensor or the quantity that is at fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from mue.checks import Report
from support.wiring.case import FOLDED, OURS, ROUTED, Case, case, forms
from support.wiring.traits import Traits, traits_of

Culprit = Callable[[Case], str]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what somebody did. apply: does it to a right case. checks: who names it.
        culprit: of a right case, the pattern that must be found in the place that a failing finding names.
        unless: of a case's traits, why the fault cannot be there, or would be no fault; empty where it is one.
        form: how the multipliers are carried in the model that it is seeded into: in the weights, in the forward pass, or as usual.
        muon: it is seeded into a model that is trained with Muon. warns: it is no fault that stops a run, and a warning names it.
    """

    name: str
    apply: Callable[[Case], None]
    checks: tuple[str, ...]
    culprit: Culprit
    unless: Callable[[Traits], str]
    form: str = "usual"
    muon: bool = False
    warns: bool = False

    @property
    def breaks(self) -> str:
        return (self.apply.__doc__ or "").strip()

    def form_in(self, family: str) -> str:
        """The form of a family's case that this fault is seeded into; empty where the family has none such."""
        here = forms(family)
        if self.form == "usual":
            return here[0]
        wanted = (ROUTED, FOLDED) if self.form == FOLDED else (self.form,)
        return next((f for f in here if f in wanted), "")

    def impossible(self, family: str) -> str:
        """Why this fault is not seeded into a family; empty where it is."""
        form = self.form_in(family)
        if not form:
            folded = "the lab's own model is checked with its multipliers" if family in OURS else ""
            return (
                folded
                or "a norm without a gain cancels the residual multiplier, so only a folded plan without one can be carried"
            )
        return self.unless(traits(family, form)) or (no_muon(family, form) if self.muon else "")


FAULTS: dict[str, Fault] = {}
"""Every fault by its name, once :func:`load` was called."""


@cache
def traits(family: str, form: str) -> Traits:
    """What is true of a family's right case."""
    return traits_of(case(family, form=form))


@cache
def no_muon(family: str, form: str) -> str:
    """Why a family's plan cannot be made for Muon; empty where it can."""
    try:
        case(family, form=form, muon=True)
    except ValueError as error:
        return f"no plan for Muon: {str(error).splitlines()[0]}"[:160]
    return ""


def possible(families: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(fault, family), a family's faults together."""
    for family in families:
        for name, fault in load().items():
            if not fault.impossible(family):
                yield name, family


def broken(name: str, family: str) -> tuple[Case, str]:
    """A case of a family with one fault in it, and the pattern of its culprit."""
    fault = load()[name]
    made = case(family, form=fault.form_in(family), muon=fault.muon)
    culprit = fault.culprit(made)
    fault.apply(made)
    return made, culprit


def names_it(report: Report, culprit: str, warns: bool = False) -> list[Any]:
    """The failing findings (warnings, where that is what it deserves) that name the culprit."""
    return [f for f in (report.warnings if warns else report.failures) if re.search(culprit, f.where)]


# ---- registering -------------------------------------------------------------------------------------------------------------


def fault(
    name: str,
    checks: str,
    culprit: Culprit | str,
    unless: Callable[[Traits], str] = lambda t: "",
    form: str = "usual",
    muon: bool = False,
    warns: bool = False,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function that puts a fault into a case (:class:`Fault`); ``checks`` are names, with commas between them."""

    def keep(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        assert name not in FAULTS
        text = culprit
        made: Culprit = (lambda c: text) if isinstance(text, str) else text
        FAULTS[name] = Fault(name, apply, tuple(checks.split(", ")), made, unless, form, muon, warns)
        return apply

    return keep


def load() -> dict[str, Fault]:
    """All faults; they stand in files that fill :data:`FAULTS` as they are imported."""
    from support.wiring import (
        faults_attention,
        faults_decay,
        faults_forward,
        faults_gates,
        faults_init,
        faults_muon,
        faults_optimizer,
        faults_training,
    )

    every = (faults_attention, faults_decay, faults_forward, faults_gates, faults_init)
    assert all((*every, faults_muon, faults_optimizer, faults_training))
    return FAULTS


def unless(**reasons: str) -> Callable[[Traits], str]:
    """Impossible where a trait of that name is true (``not_x``: where ``x`` is false), with the reason."""

    def why(t: Traits) -> str:
        for name, reason in reasons.items():
            key = name.removeprefix("not_")
            if bool(getattr(t, key)) is not name.startswith("not_"):
                return reason
        return ""

    return why


def both(*many: Callable[[Traits], str]) -> Callable[[Traits], str]:
    """The first of several reasons."""
    return lambda t: next((why for one in many if (why := one(t))), "")


MOE = unless(not_experts="no experts")
SHARED = unless(not_shared="no shared expert")
HEAD = unless(tied="the head is the embedding")
TIED = unless(not_tied="head and embedding are apart")
SPLIT = unless(ended_ffn="a norm after the feed-forward cancels what all of it is multiplied by")
ROUTER = both(MOE, unless(not_router="its router has no matrix"))


# ---- culprits ----------------------------------------------------------------------------------------------------------------


def named(*roles: str, layer: int | None = None, then: str = "") -> Culprit:
    """Any tensor of these roles (of one layer), and what must follow it in the same place."""

    def pattern(c: Case) -> str:
        names = [p.name for p in c.of(*roles) if layer is None or p.layer == layer % c.plan.target.layers]
        return rf"({'|'.join(re.escape(n) for n in dict.fromkeys(names))}){then}"

    return pattern


def branch_end(*roles: str) -> Culprit:
    """The projections of these roles, and the norms that end their branches, whose gains carry the residual multiplier."""

    def pattern(c: Case) -> str:
        projections = c.of(*roles)
        ended = {p.layout.pattern for p in projections}
        names = [p.name for p in (*projections, *(q for q in c.of("norm") if ended & set(q.layout.after)))]
        return rf"({'|'.join(re.escape(n) for n in names)})"

    return pattern


DOWN = ("ffn_down", "shared_down", "expert_down")
EXPERTS = ("expert_up", "expert_gate", "expert_down")
ROUTED_SUM = named("expert_down", "router")


# ---- tools -------------------------------------------------------------------------------------------------------------------


def around(module: nn.Module, change: Callable[..., Any]) -> None:
    """Replace a module's forward by ``change(old forward, *args, **kwargs)``."""
    old = module.forward
    module.forward = lambda *args, **kwargs: change(old, *args, **kwargs)  # type: ignore[method-assign]


def times(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns (the first of several results)."""

    def change(old: Any, *args: Any, **kwargs: Any) -> Any:
        out = old(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    around(module, change)


def writers(c: Case, *kinds: str) -> list[nn.Module]:
    """The modules whose outputs are what the matrices of some kinds write to the stream (a norm at a branch's end: ``"after"``)."""
    part = {"attention": "attention_o", "ffn": "ffn_down", "shared": "shared_down"}
    found = [c.module(p) for kind in kinds if kind in part for p in c.of(part[kind])]
    if "expert" in kinds:
        found += c.experts().values()
    if "after" in kinds:
        found += [c.module(p) for p in c.of("norm") if p.layout.after]
    return list(dict.fromkeys(found))


def turn(c: Case, name: str, power: float, kinds: tuple[str, ...] = (), last: bool = False) -> None:
    """Raise a multiplier in the forward pass to a power: 0 is missing, 2 is applied twice. ``last``: in the last layer only."""
    for knob in c.knobs:
        if (
            name in knob.factors
            and (not kinds or knob.kind in kinds)
            and (not last or knob.layer == c.plan.target.layers - 1)
        ):
            knob.factors[name] **= power


def blocks(c: Case) -> list[Any]:
    """The blocks of the lab's own model."""
    return list(c.model.blocks)  # type: ignore[arg-type]


def head_of(c: Case) -> nn.Module:
    """The module that makes the logits."""
    return c.model.head if c.ours else c.inner.get_output_embeddings()  # type: ignore[return-value, operator]


def table_of(c: Case) -> nn.Module:
    """The module that looks tokens up."""
    return c.model.embedding if c.ours else c.inner.get_input_embeddings()  # type: ignore[return-value, operator]


@torch.no_grad()
def scale(c: Case, factor: float, *roles: str) -> None:
    """Multiply the weights of some roles."""
    for p in c.of(*roles):
        p.parameter.mul_(factor)


def regroup(c: Case, groups: list[dict[str, Any]], **more: Any) -> None:
    """A new optimizer (and warmup) of other groups."""
    c.optimizer = torch.optim.AdamW(groups, **more)
    if c.scheduler is not None:
        c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambda step: min(1.0, (step + 1) / 10))
