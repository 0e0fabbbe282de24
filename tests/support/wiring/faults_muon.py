"""Faults of Muon and of what is around it: what it moves, how it makes a step orthogonal, how long the step is, what is kept."""

from __future__ import annotations

from typing import Any

import torch

from mue.model.apply import groups_of
from support.wiring.case import Case
from support.wiring.fault import (
    HEAD,
    MOE,
    ROUTER,
    Culprit,
    both,
    fault,
    named,
    unless,
)
from support.wiring.muons import Masters, own

ANY = r"embed|head|wte|blocks|layers|\.h\."
STACKED = unless(not_stacked="its experts are modules of their own")
FUSED = unless(not_fused="no hidden matrix is fused with another")
ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_o")


def _own(c: Case, *also: str, **slips: Any) -> None:
    """A user's Muon in the place of ours, with slips; ``also``: roles that it moves beside its own."""
    more = tuple(id(p.parameter) for p in c.of(*also))
    c.optimizer, c.scheduler = own(groups_of(c.plan, c.model), more, **slips), None


def muon_fault(name: str, checks: str, culprit: Culprit | str, why: Any = lambda t: "") -> Any:
    return fault(name, checks, culprit, why, muon=True)


# ---- what it moves ---------------------------------------------------------------------------------------------------------


@muon_fault("Muon on the embedding", "orthogonalisation", named("embedding"))
def _(c: Case) -> None:
    """All that has two axes goes to Muon."""
    _own(c, "embedding")


@muon_fault("Muon on the head", "orthogonalisation", named("head"), HEAD)
def _(c: Case) -> None:
    """The filter knows the embedding's name alone."""
    _own(c, "head")


@muon_fault("Muon on routers", "orthogonalisation", named("router"), ROUTER)
def _(c: Case) -> None:
    """A router is a matrix inside of the blocks."""
    _own(c, "router")


@muon_fault("Muon on gains", "orthogonalisation", named("norm", "qk_norm"), unless(not_gains="its norms have no gains"))
def _(c: Case) -> None:
    """Vectors are normalised, and move along their gradient."""
    _own(c, "norm", "qk_norm")


@muon_fault("AdamW on attention's matrices, planned for Muon", "orthogonalisation", named(*ATTENTION))
def _(c: Case) -> None:
    """A filter sent too much to the AdamW beside it."""
    groups = groups_of(c.plan, c.model)
    for g in groups:
        if g["algorithm"] == "muon" and set(g["roles"]) & {"attention_o"}:
            g["algorithm"] = "adamw"
    c.optimizer, c.scheduler = own(groups), None


@muon_fault(
    "a stack of experts as one matrix", "orthogonalisation", named("expert_up", "expert_down"), both(MOE, STACKED)
)
def _(c: Case) -> None:
    """All experts below each other."""
    _own(c, flat="rows")


@muon_fault("every expert as one row", "orthogonalisation", named("expert_up", "expert_down"), both(MOE, STACKED))
def _(c: Case) -> None:
    """What is right for convolutions: the first axis against the rest."""
    _own(c, flat="vectors")


@muon_fault(
    "fused projections as one matrix", "orthogonalisation", r"qkv|c_attn|gate_up|query_key_value|proj|experts", FUSED
)
def _(c: Case) -> None:
    """q, k and v, or gate and up, as they lie in the tensor."""
    _own(c, flat="parts")


# ---- how it makes a step orthogonal ----------------------------------------------------------------------------------------


@muon_fault("Newton-Schulz left out", "orthogonalisation", ANY)
def _(c: Case) -> None:
    """Momentum, normalised."""
    _own(c, steps=0)


@muon_fault("two steps of Newton-Schulz", "orthogonalisation", ANY)
def _(c: Case) -> None:
    """Weak directions stay weak."""
    _own(c, steps=2)


@muon_fault("three steps of Newton-Schulz", "orthogonalisation", ANY)
def _(c: Case) -> None:
    """A setting to save time."""
    _own(c, steps=3)


@muon_fault("no Nesterov", "momentum", ANY)
def _(c: Case) -> None:
    """The average without the look-ahead."""
    _own(c, nesterov=False)


@muon_fault("Muon's default momentum", "momentum", ANY)
def _(c: Case) -> None:
    """0.95 was kept where the plan has another."""
    _own(c, momentum=0.95)


@muon_fault("momentum that is never kept", "momentum", ANY)
def _(c: Case) -> None:
    """A buffer that is made again in each step."""
    _own(c, momentum=1e-9)


# ---- how long the step is --------------------------------------------------------------------------------------------------


@muon_fault("updates scaled to AdamW's RMS under a plan in Keller's convention", "update scale", ANY)
def _(c: Case) -> None:
    """0.2·√max(out, in)."""
    _own(c, scale="match_rms_adamw")


@muon_fault("updates scaled by √(out/in) under a plan in Keller's convention", "update scale", ANY)
def _(c: Case) -> None:
    """The spectral one, which differs for wide matrices alone."""
    _own(c, scale="spectral_unclamped")


@muon_fault("updates not scaled by shape", "update scale", ANY)
def _(c: Case) -> None:
    """A name of a convention that the optimizer does not know, and takes for none."""
    _own(c, scale="none")


@muon_fault("all updates clipped together after they are orthogonal", "update scale", ANY)
def _(c: Case) -> None:
    """A global norm of 1, as of gradients."""
    _own(c, clip="update")


@muon_fault("each update clipped after it is orthogonal", "update scale", ANY)
def _(c: Case) -> None:
    """A norm of 1 for each tensor."""
    _own(c, clip="each")


@muon_fault("the step clipped with the rate in it", "update scale", ANY)
def _(c: Case) -> None:
    """The threshold is below every step, so that the rate does nothing."""
    _own(c, clip="step")


# ---- weight decay ----------------------------------------------------------------------------------------------------------


@muon_fault("Muon without weight decay", "weight decay", ANY)
def _(c: Case) -> None:
    """The first Muon had none, and the groups' is not looked at."""
    _own(c, decay=0.0)


@muon_fault("Muon with weight decay twice", "weight decay", ANY)
def _(c: Case) -> None:
    """In the optimizer and in the loop."""
    _own(c, decay=2.0)


@muon_fault("Muon with weight decay that is not multiplied by the rate", "weight decay", ANY)
def _(c: Case) -> None:
    """Weights shrink by wd."""
    _own(c, independent=True)


@muon_fault("Muon decays what is planned to stay out, and nothing else", "weight decay", ANY)
def _(c: Case) -> None:
    """A mask that is turned round."""
    _own(c, exchanged=True)


# ---- what is kept ----------------------------------------------------------------------------------------------------------


@fault("AdamW's masters made before the init", "stale copies", ANY)
def _(c: Case) -> None:
    """The first step throws the init away."""
    groups = c.plan.param_groups(c.model)
    c.optimizer, c.scheduler = Masters(groups, torch.optim.AdamW), None  # type: ignore[assignment]
    c.plan.init_(c.model, seed=9)


@muon_fault("Muon's masters made before the init", "stale copies", ANY)
def _(c: Case) -> None:
    """The same of a wrapper around Muon."""
    c.optimizer, c.scheduler = Masters(groups_of(c.plan, c.model), own), None  # type: ignore[assignment]
    c.plan.init_(c.model, seed=9)


@fault("masters of a checkpoint that was loaded into the model alone", "stale copies", ANY)
def _(c: Case) -> None:
    """Weights that differ by little from those that the optimizer has."""
    c.optimizer, c.scheduler = Masters(c.plan.param_groups(c.model), torch.optim.AdamW), None  # type: ignore[assignment]
    with torch.no_grad():
        for p in c.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


# ---- warnings --------------------------------------------------------------------------------------------------------------


@fault("warmup shorter than Adam's average", "scheduler", r"warmup", warns=True)
def _(c: Case) -> None:
    """The plan warms up over one average over squared gradients, the loop over less."""
    beta2 = c.plan.betas[1]
    average = 1 / (1 - beta2)
    c.plan = c.plan.retuned(warmup=float(round(1.2 * average)))
    short = round(0.8 * average)
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambda step: min(1.0, (step + 1) / short))
