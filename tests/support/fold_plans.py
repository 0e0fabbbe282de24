"""Plans to be folded, their models in both forms, and how far two trainings lie apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

import mue
from mue.fold import coefficients, convert, fold
from mue.shapes import Transformer
from support import fold_optimizers as exact
from support.fold_model import Decoder

STEPS = 200  # of both trainings: what is folded wrongly by a percent is far apart by then
# Between tokens and logits of one layer of the sizes below: eight products over up to 15, attention and norms over 12.
OPERATIONS = 8 * 15 + 6 * 12
SIZES: dict[str, Any] = {"head_dim": 4, "vocab": 11, "sequence": 8}
# Every multiplier differs from 1 and none is a power of two: e = 9/8 or 5/4 against 2, three layers against one, width 12.
BASE = mue.Dense(width=4, ffn=8, layers=3, **SIZES)
MOE = mue.MoE.parse("4e2a1s", width=12, expert=5, layers=1, shared=5, **SIZES)
DENSE = mue.Dense(width=12, ffn=15, layers=1, **SIZES)
TUNED = mue.HParams(lr=4e-3, weight_decay=0.5, init_std=0.3, eps=1e-3)
ROUTED = mue.MoE.parse("4e2a", width=12, expert=5, layers=1, **SIZES)
# What an optimizer needs to move at all; Adafactor's eps1 must not bind, for torch reads it as two different things.
OWN: dict[str, dict[str, float]] = {"sgd": {"lr": 2e-2}, "adafactor": {"eps": 1e-30}}

MAKE: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": lambda g: torch.optim.AdamW(g, fused=True),
    "adamw-amsgrad": lambda g: torch.optim.AdamW(g, amsgrad=True, fused=True),
    "nadamw": lambda g: torch.optim.NAdam(g, decoupled_weight_decay=True, foreach=True),
    "adamw-independent": exact.IndependentAdamW,
    "adam-l2": lambda g: torch.optim.Adam(g, fused=True),
    "lion": exact.Lion,
    "signsgd": exact.SignSGD,
    "sgd": lambda g: torch.optim.SGD(g, fused=True),
    "sgd-decoupled": exact.DecoupledSGD,
    "muon": exact.ExactMuon,
    "shampoo": exact.Shampoo,
    "soap": exact.Soap,
    "lamb": exact.Lamb,
    "lars": exact.Lars,
    "adafactor": torch.optim.Adafactor,
    "hyperball": exact.Hyperball,
}


FAMILY = {"adamw-amsgrad": "adamw", "sgd-decoupled": "sgd"}  # whose row an optimizer above takes, if not its own


def planned(optimizer: str, target: Transformer | None = None, **changes: Any) -> mue.Plan:
    """A plan in multiplier form for an optimizer (or its family), on a target that the rule can plan for it."""
    family = FAMILY.get(optimizer, optimizer)
    rule = "hyperp" if family == "hyperball" else "complete-mue"
    tuned = TUNED.replace(**{"optimizer": family, **OWN.get(family, {}), **changes})
    target = target or {"adamw": MOE, "adafactor": MOE, "muon": ROUTED, "hyperball": replace(DENSE, ffn=24)}.get(
        family, DENSE
    )
    return mue.transfer(BASE, target, tuned, rule=rule)


def model_of(plan: mue.Plan, seed: int = 0) -> Decoder:
    """The planned model, with biases that are not zero."""
    model = Decoder(plan.target, plan.multipliers)
    plan.init_(model, seed)
    return model


def twins(plan: mue.Plan, route: str = "weights") -> tuple[Decoder, Decoder, mue.Plan]:
    """The model in both forms with the same effective weights, biases away from zero."""
    folded = fold(plan, route)
    one, two = model_of(plan), Decoder(plan.target, folded.multipliers)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    convert(one, plan, two, folded)
    return one, two, folded


def distance(one: Decoder, two: Decoder, folded: mue.Plan) -> float:
    """Largest relative difference of an effective weight, over all parameters."""
    c = coefficients(folded, two)
    found = []
    for (_, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        effective = p * c[q]
        found.append(((effective - q).abs().max() / effective.abs().max().clamp_min(1e-30)).item())
    return max(found)
