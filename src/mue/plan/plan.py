"""A plan as data: what it follows from, the values of every role, and how that is hashed, compared and saved. No torch.

How the values come about is :mod:`mue.plan.transfer`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mue.plan.convention import Convention
from mue.plan.values import BlockPlan, Folding, Multipliers, RolePlan
from mue.rules.options import as_json, written
from mue.rules.registry import RULES
from mue.rules.roles import ROLES
from mue.rules.table import Rule
from mue.shapes import HParams, Training, Transformer
from mue.util.errors import nearest
from mue.util.files import digest, rounded, write_json

# Of plan files, so that another meaning can be told from this one; mue.plan.replan reads the older ones as they were meant.
# 2: heads without head_dim imply width / heads, where it was 64.
FORMAT = 2
HASH_KEYS = ("plan", "plan_hash", "mue_plan")  # under any of these a checkpoint keeps the hash of its plan
# What no rule here scales, and a plan carries all the same, marked so (docs/glossary.md#the-fields-of-a-plan).
UNCHANGED = ("optimizer", "clip", "warmup", "floor", "balance", "z", "bias_speed")
TEXTS = frozenset(
    {"source", "status", "marks", "formula", "notes", "critical_batch"}
)  # what explains a plan and is no part of its meaning
UNCHANGED_BY_MUON = ("update_scale", "muon_moves")
AnyPlan = TypeVar("AnyPlan", bound="PlanData")


@dataclass(frozen=True)
class Inputs:
    """All that a plan follows from, as plain numbers: shapes, runs, tuned values, the base's habits, the rule's options.

    ``base`` is a shape, or the plan whose target was tuned; its values then take the place of ``tuned``. ``given``: what a file gave of
    them, as dotted keys, for the text of the plan (:mod:`mue.plan.defaults`); no part of its meaning.
    """

    base: Transformer | PlanData
    target: Transformer
    tuned: HParams | None
    base_training: Training | None
    training: Training | None
    rule: str
    convention: Convention
    options: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plan files hold it. In their format α stands beside the other options, null where the rule has none."""
        options = written(RULES.lookup(self.rule), self.options)
        depth = options.pop("depth_exponent", None)
        return {
            "base": self.base.to_dict() if isinstance(self.base, Transformer) else {"plan": self.base.inputs.to_dict()},
            "target": self.target.to_dict(),
            "tuned": None if self.tuned is None else self.tuned.to_dict(),
            "base_training": None if self.base_training is None else self.base_training.to_dict(),
            "training": None if self.training is None else self.training.to_dict(),
            "rule": self.rule,
            "convention": {f.name: getattr(self.convention, f.name) for f in fields(Convention)},
            "depth_exponent": None if depth is None else str(depth),
            "options": options,
        }


@dataclass(frozen=True, eq=False)
class PlanData:
    """Every hyperparameter of the target, role by role, as numbers; two plans are equal where their :attr:`hash` is.

    Made by :func:`mue.plan.transfer.transfer`. What users hold is :class:`mue.api.Plan`, this with everything that reaches
    up: onto a model, into a stack's file, onto a screen.

    Attributes:
        inputs: all that the plan follows from. rule: with every option resolved. tuned: the base's values.
        target: the shape to train. training: its run, or None.
        blocks: one entry for each kind of block, in order. roles: the same over the whole model, None where blocks differ.
        residual_multiplier: l^-α, on both branches of every block. head_multiplier: on the logits.
        attention_scale: on q·k. betas: Adam's, carried over the change of steps.
        notes: what a reader must know beyond the numbers. folding: how multipliers went into weights; None: they did not.
    """

    inputs: Inputs
    rule: Rule
    tuned: HParams
    target: Transformer
    training: Training | None
    blocks: tuple[BlockPlan, ...]
    roles: Mapping[str, RolePlan]
    residual_multiplier: float
    head_multiplier: float
    attention_scale: float
    betas: tuple[float, float]
    notes: tuple[str, ...] = field(default=())
    folding: Folding | None = None

    # ---- what holds for the whole model -------------------------------------------------------------------------

    def _same(self, name: str) -> Any:
        # None and not a mean: a number that holds in no block would be used (docs/glossary.md#the-fields-of-a-plan)
        values = {getattr(block, name) for block in self.blocks}
        return values.pop() if len(values) == 1 else None

    @property
    def active_width(self) -> int | None:
        """H_act; None where blocks differ."""
        return self._same("active_width")  # type: ignore[no-any-return]

    @property
    def output_multiplier(self) -> float | None:
        """A of the feed-forward branch; None where blocks differ."""
        return self._same("output_multiplier")  # type: ignore[no-any-return]

    @property
    def route_scale(self) -> float | None:
        """R on the normalised routed sum; None where blocks differ."""
        return self._same("route_scale")  # type: ignore[no-any-return]

    @property
    def drift(self) -> dict[str, float | None]:
        """What moves and is reported, not corrected (docs/why/limits.md#drift); None where blocks differ."""
        merged: dict[str, float | None] = {}
        for name in self.blocks[0].drift:
            values = {block.drift[name] for block in self.blocks}
            merged[name] = values.pop() if len(values) == 1 else None
        return merged

    @property
    def momentum(self) -> float:
        """Muon's average over gradients, carried over a change of steps as β1 is; β1 itself where none was tuned apart.

        Raises:
            ValueError: it would leave [0, 1).
        """
        μ, before, after = self.tuned.momentum, self.tuned.betas[0], self.betas[0]
        if μ is None or before == after:
            return after if μ is None else μ
        if self.rule.betas == "power":
            carried = μ ** (math.log(after) / math.log(before)) if before > 0 else after
        else:
            carried = 1 - (1 - μ) * (1 - after) / (1 - before)
        if carried < 0:
            raise ValueError(
                f'momentum = {μ:g} cannot be carried with the betas, 1-μ would be {1 - carried:g}: betas = "power"'
            )
        return carried

    @property
    def multipliers(self) -> Multipliers:
        """The forward multipliers, one A and one R per layer."""
        return Multipliers(
            residual=self.residual_multiplier,
            head=self.head_multiplier,
            attention_scale=self.attention_scale,
            output=tuple(block.output_multiplier for block in self.per_layer),
            route=tuple(block.route_scale for block in self.per_layer),
        )

    def role(self, role: str, layer: int | None = None) -> RolePlan:
        """One role's plan, in one layer where blocks may differ; ``ValueError`` for an unknown role or layer."""
        if role not in self.roles:
            raise ValueError(f"unknown role {role!r}{nearest(role, ROLES)}")
        if layer is None:
            return self.roles[role]
        return self.blocks[self.block_of(layer)].roles[role]

    @cached_property
    def _indices(self) -> tuple[int, ...]:
        return tuple(index for index, block in enumerate(self.blocks) for _ in range(block.layers))

    @property
    def per_layer(self) -> tuple[BlockPlan, ...]:
        """The block of every layer, in order: each of ``blocks`` as often as it has layers."""
        return tuple(self.blocks[index] for index in self._indices)

    def block_of(self, layer: int) -> int:
        """The index in ``blocks`` of a layer's block; ``ValueError`` for a layer that does not exist."""
        if not 0 <= layer < len(self._indices):
            raise ValueError(f"layer {layer} does not exist: the plan has {len(self._indices)}")
        return self._indices[layer]

    def layers_of(self, index: int) -> str:
        """``"layers 0–3"``: which layers a block of the plan stands for."""
        first = self._indices.index(index)
        last = first + self.blocks[index].layers - 1
        return f"layer {first}" if last == first else f"layers {first}–{last}"

    # ---- as JSON, compared, saved --------------------------------------------------------------------------------

    @property
    def unchanged(self) -> dict[str, Any]:
        """What the target takes from the base as it is."""
        return {name: getattr(self.tuned, name) for name in UNCHANGED} | {
            name: value for name, value in self.tuned.beside_adamw.items() if name in UNCHANGED_BY_MUON
        }

    def to_dict(self) -> dict[str, Any]:
        """What ``mue plan --json`` prints; the meaning of each field: docs/glossary.md#the-fields-of-a-plan."""
        return {
            "format": FORMAT,
            "rule": self.rule.name,
            "hash": self.hash,
            **self.content(),
            "notes": list(self.notes),
            "inputs": self.inputs.to_dict(),
        }

    def content(self) -> dict[str, Any]:
        """The part of :meth:`to_dict` that is hashed, compared and checked when a file is read back.

        Texts are in it and are dropped before hashing: a better wording of a source makes no new plan.
        """
        return {
            "active_width": self.active_width,
            "output_multiplier": self.output_multiplier,
            "route_scale": self.route_scale,
            "residual_multiplier": self.residual_multiplier,
            "head_multiplier": self.head_multiplier,
            "attention_scale": self.attention_scale,
            "betas": list(self.betas),
            "drift": self.drift,
            "roles": {role: plan.to_dict() for role, plan in self.roles.items()},
            "blocks": [block.to_dict() for block in self.blocks],
            "unchanged": self.unchanged,
            "options": written(RULES.lookup(self.rule.name), as_json(self.rule.options)),
            "folded": None if self.folding is None else self.folding.to_dict(),
        }

    @cached_property
    def hash(self) -> str:
        """16 hex digits over the meaning: inputs and values, not texts, key order or the last bits of a float."""
        return digest({"meaning": drop_texts(self.content()), "inputs": drop_texts(self.inputs.to_dict())})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanData) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def diff(self, other: PlanData) -> list[tuple[str, Any, Any]]:
        """Every value in which two plans differ: (path, mine, theirs), texts left out."""
        mine, theirs = (
            flatten(drop_texts({**p.content(), "rule": p.rule.name, "options": as_json(p.rule.options)}))
            for p in (self, other)
        )
        keys = list(dict.fromkeys([*mine, *theirs]))
        return [(k, mine.get(k), theirs.get(k)) for k in keys if rounded(mine.get(k)) != rounded(theirs.get(k))]

    def like(self, other: AnyPlan) -> AnyPlan:
        """This plan as another's class, so that what is made of a user's ``mue.Plan`` is one too."""
        return type(other)(**{f.name: getattr(self, f.name) for f in fields(self)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())


def drop_texts(data: Any) -> Any:
    """Nested data with everything left out that explains and does not mean."""
    if isinstance(data, Mapping):
        return {k: drop_texts(v) for k, v in data.items() if k not in TEXTS}
    return [drop_texts(v) for v in data] if isinstance(data, list | tuple) else data


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """Nested data as ``{"roles.head.lr": ..., "betas[0]": ...}``."""
    if isinstance(data, Mapping):
        return {
            k: v
            for key, value in data.items()
            for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(data, list | tuple):
        return {k: v for i, value in enumerate(data) for k, v in flatten(value, f"{path}[{i}]").items()}
    return {path: data}
