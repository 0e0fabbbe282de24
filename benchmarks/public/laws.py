"""What rules and fitted laws say of lr* when a model, its tokens or its batch change: each in log2, with where it was read.

A law is a sum of exponents times log2 of numbers; only differences count, for most publish no constant that fits another set-up.
Our own rules are asked, not copied: :func:`rule_change` reads a plan of ``mue.transfer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import mue
from mue.rules import RULES as RULE_TABLES
from mue.rules.laws.law import lr_law
from mue.rules.options import option_names
from mue.shapes import Block
from public.cells import Cell, Shape

SEQUENCE = 2048


@dataclass(frozen=True)
class Law:
    """A published law: exponents by quantity, and its source.

    Quantities: ``tokens``, ``batch``, ``width``, ``layers``, ``total``, ``active`` (parameters), ``compute`` (6 · active · tokens),
    ``experts``, ``sparsity`` (N/a).
    """

    name: str
    exponents: Mapping[str, float]
    source: str
    log2_constant: float | None = None

    def log2_lr(self, cell: Cell) -> float:
        """Its log2 lr, up to a constant where it has none."""
        numbers = quantities(cell)
        return (self.log2_constant or 0.0) + sum(e * math.log2(numbers[q]) for q, e in self.exponents.items())

    def change(self, base: Cell, target: Cell) -> float:
        """Octaves from base to target."""
        return self.log2_lr(target) - self.log2_lr(base)


def quantities(cell: Cell) -> dict[str, float]:
    """The numbers that laws are written in."""
    shape = cell.shape
    return {
        "tokens": cell.tokens,
        "batch": cell.batch,
        "width": shape.width,
        "layers": shape.layers,
        "total": shape.total,
        "active": shape.active,
        "compute": 6 * shape.active * cell.tokens,
        "experts": shape.experts,
        "sparsity": shape.experts / shape.chosen,
    }


# What the library's laws read → the quantity here.
_READ = {
    "N": "total",
    "N_a": "active",
    "d": "width",
    "L": "layers",
    "E": "experts",
    "S": "sparsity",
    "D": "tokens",
    "B": "batch",
    "C": "compute",
}


def _law(name: str, registered: str, source: str, log2_constant: float | None = None, **other: str) -> Law:
    """A law of the library, in this page's words; ``other`` reads a quantity in place of its own."""
    exponents = {{**_READ, **other}[symbol]: power for symbol, power in lr_law(registered).exponents.items()}
    return Law(name, exponents, source, log2_constant)


LAWS = (
    _law(
        "Step Law",
        "step-law",
        "arXiv 2503.04715, abstract pages and code/fit_tool.py; at its own batch 0.58 D^0.571, so batch moves with tokens; no batch in it",
        math.log2(1.79),
    ),
    _law(
        "Step Law by active N",
        "step-law",
        "the same with the parameters that a token meets: which N is meant for a MoE is not said where we could read",
        math.log2(1.79),
        N="active",
    ),
    _law(
        "Marin March",
        "marin",
        "marin issue #5818 (description, formula of the AdamH heuristic of #4225; batch assumed)",
    ),
    _law(
        "Marin May",
        "marin-may",
        "marin issue #5951, comment of 2026-05-26 (MuonH; 17 cells, R² 0.996; batch assumed)",
    ),
    _law(
        "Marin August",
        "marin-august",
        "marin issues #7856 and #8003 (MuonH; 122 runs of 150, R² 0.978; batch assumed), figures as noted by an earlier reading",
    ),
    _law(
        "Zhou et al.",
        "zhou",
        "arXiv 2601.05049, eq. 6 as given at chatpaper.com/paper/224700 (WSD, MoE, R² 0.962; N taken as active; batch not in it)",
    ),
    _law(
        "Ling",
        "ling",
        "arXiv 2507.17702, constants as used in marin issue #3466 (comment of 2026-03-09); batch 0.0694 C^0.3644 beside it",
    ),
    _law(
        "Ludziejewski et al.",
        "ludziejewski",
        "arXiv 2502.05172, formula as given at occupying-mars.notion.site (tokens and batch not in it)",
    ),
    _law(
        "nmoe",
        "nmoe",
        "modal-projects/nmoe at 556f77c, configs/scaling/*.toml: fitted to the published rates of four models, not to sweeps",
    ),
    Law(
        "OLMo ladder",
        {"total": -1 / 3},
        "OLMo-core model_ladder (#494, #551), as noted by an earlier reading; batch N^(2/3) beside it",
    ),
)


def power(p: float, q: float) -> Law:
    """A matrix inside a block under complete-mue with ρ_B^p · ρ_D^-q, by hand: what the rule's two options could be set to."""
    return Law(f"complete-mue, p = {p:g}, q = {q:g}", {"width": -1.0, "batch": p, "tokens": -q}, "by hand")


BY_HAND = (power(0.5, 0.0), power(0.35, 0.0), power(0.5, 0.25), power(0.75, 0.28))
RULES = ("complete-mue", "complete-mue-paper", "hidden-ratio-only", "standard")
SDE = {"batch_exponent": Fraction(1, 2), "duration_exponent": Fraction(1, 2)}
"""The two exponents as theory has them, whatever a rule's defaults are by now; other values are ``BY_HAND``."""
ROLES = ("attention_q", "embedding")
"""A matrix inside a block, and the embedding: the two that a rule treats most differently."""


def transformer(shape: Shape) -> mue.Dense | mue.MoE | mue.Mixed:
    """The model as our library holds it, with the layer that Step Law's MoEs begin with left as experts like the others."""
    head = next(h for h in (128, 64) if shape.width % h == 0 and (h == 128 or shape.width % 128))
    if shape.dense:
        return mue.Dense(
            width=shape.width, ffn=shape.active_width, layers=shape.layers, head_dim=head, sequence=SEQUENCE
        )
    block = Block(
        layers=shape.layers,
        expert=shape.expert,
        experts=shape.experts,
        active=shape.chosen,
        shared_experts=1,
        shared=shape.shared,
    )
    return mue.Mixed(shape.width, (block,), head_dim=head, sequence=SEQUENCE)


def rule_change(rule: str, base: Cell, target: Cell) -> dict[str, float]:
    """Octaves that a rule of ours moves the rate of ``ROLES`` from base to target.

    A rule has a rate for each role, these runs one for all: what it says of the one lies between its roles.
    """
    return dict(zip(ROLES, _planned(rule, base.shape, target.shape, *(_run(c) for c in (base, target))), strict=True))


def _run(cell: Cell) -> tuple[int, int]:
    return round(cell.batch), round(cell.steps)


@cache  # the scenarios overlap
def _planned(
    rule: str, base: Shape, target: Shape, run: tuple[int, int], next_run: tuple[int, int]
) -> tuple[float, ...]:
    """The octaves of ``ROLES``; runs as batch in tokens and steps."""
    # betas so near to 1 that they can be carried to any number of steps: only rates are read here
    tuned = mue.HParams(lr=1.0, weight_decay=0.1, init_std=0.02, betas=(0.9999, 0.9999))
    runs = [mue.Training(batch=batch, steps=steps) for batch, steps in (run, next_run)]
    options: dict[str, Any] = {name: value for name, value in SDE.items() if name in option_names(RULE_TABLES[rule])}
    shapes = transformer(base), transformer(target)
    roles = mue.transfer(*shapes, tuned, base_training=runs[0], training=runs[1], rule=rule, **options).to_dict()[
        "roles"
    ]
    return tuple(math.log2(roles[role]["factor"]["lr"]) for role in ROLES)


def folded_change(rule: str, base: Shape, target: Shape) -> dict[str, float]:
    """Octaves that a rule moves each matrix of a stock model, forward multipliers folded in, when only the shape changes."""
    tuned = mue.HParams(lr=1.0, weight_decay=0.1, init_std=0.02)
    folded = mue.fold.fold(mue.transfer(transformer(base), transformer(target), tuned, rule=rule)).to_dict()["roles"]
    names = (
        "attention_q",
        "attention_o",
        *(("ffn_up", "ffn_down") if target.dense else ("expert_up", "expert_down", "shared_down")),
    )
    return {name: math.log2(folded[name]["factor"]["lr"]) for name in names}
