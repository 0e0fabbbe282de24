"""rule + base + target → Plan: value, factor and reason of every role. Numbers in, numbers out; no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mue import planning, render, starred
from mue.files import digest, rounded, write_json
from mue.inputs import Convention, Inputs
from mue.meaning import flat, without_texts
from mue.planned import BlockPlan, Folding, Multipliers, RolePlan, Values
from mue.ratios import refuse
from mue.rules import get_rule
from mue.rules.optimizers import for_optimizer
from mue.rules.options import plain
from mue.rules.table import FIELDS, ROLES, Rule
from mue.shapes import Block, HParams, Training, Transformer
from mue.words import nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FIELDS", "BlockPlan", "Convention", "Inputs", "Multipliers", "Plan", "RolePlan", "Values", "transfer"]

FORMAT = 1
UNCHANGED = ("optimizer", "clip", "warmup", "floor", "balance", "z", "bias_speed")


@dataclass(frozen=True, eq=False)
class Plan:
    """Every hyperparameter of the target, role by role. Made by :func:`transfer`; compares equal by :attr:`hash`."""

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
        """What moves and is reported, not corrected (conventions 6); None where blocks differ."""
        merged: dict[str, float | None] = {}
        for name in self.blocks[0].drift:
            values = {block.drift[name] for block in self.blocks}
            merged[name] = values.pop() if len(values) == 1 else None
        return merged

    @property
    def multipliers(self) -> Multipliers:
        """The forward multipliers, one A and one R per layer."""
        return Multipliers(
            residual=self.residual_multiplier,
            head=self.head_multiplier,
            attention_scale=self.attention_scale,
            output=tuple(b.output_multiplier for b in self.blocks for _ in range(b.layers)),
            route=tuple(b.route_scale for b in self.blocks for _ in range(b.layers)),
        )

    def role(self, role: str, layer: int | None = None) -> RolePlan:
        """One role's plan, in one layer where blocks may differ; ``ValueError`` for an unknown role or layer."""
        if role not in self.roles:
            raise ValueError(f"unknown role {role!r}{nearest(role, ROLES)}")
        if layer is None:
            return self.roles[role]
        seen = 0
        for block in self.blocks:
            seen += block.layers
            if 0 <= layer < seen:
                return block.roles[role]
        raise ValueError(f"layer {layer} does not exist: the plan has {seen}")

    def layers_of(self, index: int) -> str:
        """``"layers 0–3"``: which layers a block of the plan stands for."""
        first = sum(block.layers for block in self.blocks[:index])
        last = first + self.blocks[index].layers - 1
        return f"layer {first}" if last == first else f"layers {first}–{last}"

    # ---- on a model ---------------------------------------------------------------------------------------------

    def init_(self, model: nn.Module, seed: int = 0) -> None:
        """Draw every parameter as planned, in place; see :func:`mue.apply.init_`."""
        from mue.apply import init_

        init_(self, model, seed=seed)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups, one per distinct setting; see :func:`mue.apply.param_groups`."""
        from mue.apply import param_groups

        return param_groups(self, model)

    def export(self, to: str, model: Any = None) -> str:
        """The plan as a file of another training stack; see :func:`mue.export.export`."""
        from mue.export import export

        return export(self, to, model)

    # ---- changed, compared, saved -------------------------------------------------------------------------------

    def retuned(self, **changes: Any) -> Plan:
        """The same transfer from other tuned values (``lr=…, weight_decay=…``), through any chain of plans."""
        if isinstance(self.inputs.base, Plan):
            return self._again(replace(self.inputs, base=self.inputs.base.retuned(**changes)))
        return self._again(replace(self.inputs, tuned=self.tuned.replace(**changes)))

    def scaled(self, multiplier: float) -> Plan:
        """The same transfer with every tuned learning rate times ``multiplier``."""
        roles = {r: {k: v * multiplier if k == "lr" else v for k, v in t.items()} for r, t in self.tuned.roles.items()}
        return self.retuned(lr=self.tuned.lr * multiplier, roles=roles)

    def _again(self, inputs: Inputs) -> Plan:
        """The plan of other inputs, folded if this one is."""
        return _refolded(inputs.plan(), self.folding)

    @property
    def unchanged(self) -> dict[str, Any]:
        """What the target takes from the base as it is."""
        return {name: getattr(self.tuned, name) for name in UNCHANGED}

    def to_dict(self) -> dict[str, Any]:
        """What ``mue plan --json`` prints; the meaning of each field is conventions 5."""
        return {
            "format": FORMAT,
            "rule": self.rule.name,
            "hash": self.hash,
            **self._meaning(),
            "notes": list(self.notes),
            "inputs": self.inputs.to_dict(),
        }

    def _meaning(self) -> dict[str, Any]:
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
            "options": plain(self.rule.options),
            "folded": None if self.folding is None else self.folding.to_dict(),
        }

    @cached_property
    def hash(self) -> str:
        """16 hex digits over the meaning: inputs and values, not texts, key order or the last bits of a float."""
        return digest({"meaning": without_texts(self._meaning()), "inputs": self.inputs.to_dict()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def diff(self, other: Plan) -> list[tuple[str, Any, Any]]:
        """Every value in which two plans differ: (path, mine, theirs), texts left out."""
        mine, theirs = (flat(without_texts({**p._meaning(), "rule": p.rule.name})) for p in (self, other))
        keys = list(dict.fromkeys([*mine, *theirs]))
        return [(k, mine.get(k), theirs.get(k)) for k in keys if rounded(mine.get(k)) != rounded(theirs.get(k))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan back; ``ValueError`` if the file is no plan, or its numbers are not those that follow from its inputs."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            folded = data.get("folded")
            plan = _refolded(Inputs.from_dict(data["inputs"]).plan(), Folding(folded["route"]) if folded else None)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; write a plan with plan.save or mue plan --save") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a saved plan ({error}); write one with plan.save or mue plan --save"
            ) from error
        stored = rounded(flat({k: data.get(k) for k in plan._meaning()}))
        ours = rounded(flat(plan._meaning()))
        wrong = next((k for k in ours if ours[k] != stored.get(k)), None)
        if wrong or data.get("hash") != plan.hash:
            raise ValueError(
                f"{path} was edited or written by another version: {wrong or 'hash'} is"
                f" {stored.get(wrong) if wrong else data.get('hash')!r}, its inputs give {ours[wrong] if wrong else plan.hash!r}; plan again"
            )
        return plan

    # ---- printed ------------------------------------------------------------------------------------------------

    def header(self) -> list[tuple[str, str]]:
        """The plan in a few lines: (what, value)."""
        return render.header(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and one line per role present (per block where blocks differ): values, factors, source and mark."""
        return render.table(self)

    def __str__(self) -> str:
        return render.text(self)


def _refolded(plan: Plan, folding: Folding | None) -> Plan:
    if folding is None:
        return plan
    from mue.fold import fold

    return fold(plan, folding.route)


def transfer(
    base: Transformer | Plan,
    target: Transformer,
    tuned: HParams | None = None,
    *,
    base_training: Training | None = None,
    training: Training | None = None,
    rule: str = "complete-mue",
    convention: Convention | None = None,
    depth_exponent: Fraction | float | str | None = None,
    duration_exponent: Fraction | float | str | None = None,
    weight_decay_width: str | None = None,
    head: str | None = None,
    betas: str | None = None,
    up_gate_correction: bool | None = None,
) -> Plan:
    """The target's hyperparameters, from the values tuned on the base.

    Args:
        base: the shape that was tuned, or another plan (its values then take the place of ``tuned``).
        target: the shape to train. Its own ``output_multiplier`` is decided here.
        tuned: the base's values; peak lr, torch's decoupled weight decay unless ``convention`` says otherwise.
        base_training, training: the tuned run and the planned one: both, or neither for no batch or duration change.
        rule: a name from :data:`mue.rules.RULES`.
        convention: the base's habits.
        depth_exponent: CompleteP's α in [1/2, 1], 1 by default.
        duration_exponent: q of rates × ρ_D^-q, 1/2 by default; another value loses two invariants, and says so.
        weight_decay_width: ``"constant-product"`` (default), ``"sqrt-width"`` or ``"none"``.
        head: ``"completep"`` (default) or ``"paper"``. betas: ``"linear"`` (default) or ``"power"``.
        up_gate_correction: experimental correction of the up/gate drift, off by default.

    Raises:
        ValueError: naming the number and the fix, for anything the rule cannot answer, and for an option it lacks.

    Source: Complete-muE (arXiv 2605.23893) for the default rule; each row of a plan names its own.
    """
    given = {
        "depth_exponent": depth_exponent,
        "duration_exponent": duration_exponent,
        "weight_decay_width": weight_decay_width,
        "head": head,
        "betas": betas,
        "up_gate_correction": up_gate_correction,
    }
    convention = convention or Convention()
    start = (
        _from_plan(base, tuned, base_training, training, convention)
        if isinstance(base, Plan)
        else _from_shape(base, tuned, base_training, training, convention)
    )
    hparams = start.tuned
    starred.check_roles(hparams, start.shape)
    change = planning.Change(start.shape, target, start.training, training or start.training)
    the_rule = for_optimizer(get_rule(rule, **given), hparams.optimizer)
    convention.check_optimizer(hparams.optimizer)
    shared = change.ratios(target.blocks[0])
    refuse(the_rule, start.shape, target, shared)

    def planned(block: Block, third: str) -> BlockPlan:
        return planning.block_plan(
            the_rule,
            change,
            block,
            start.output,
            lambda role: start.values(role, third, convention),
            lambda role: starred.said(hparams, role, third),
        )

    blocks = tuple(planned(block, third) for block, third in starred.bands(target, hparams))
    planning.check_output_multiplier(target, blocks)
    options = plain(the_rule.options)
    depth = options.pop("depth_exponent", None)
    return Plan(
        inputs=Inputs(
            base,
            target,
            tuned,
            base_training,
            training,
            rule,
            convention,
            None if depth is None else str(depth),
            options,
        ),
        rule=the_rule,
        tuned=hparams,
        target=target,
        training=change.training,
        blocks=blocks,
        roles=planning.merge(blocks),
        residual_multiplier=start.residual * the_rule.residual_multiplier(shared),
        head_multiplier=start.head * the_rule.head_multiplier(shared),
        attention_scale=start.scale * (start.shape.head_dim / target.head_dim) ** float(the_rule.attention_exponent),
        betas=planning.carried_betas(start.betas, the_rule, change, shared),
        notes=planning.notes(the_rule, start.shape, target, hparams, planned_base=start.plan is not None),
    )


@dataclass(frozen=True)
class _Start:
    """What a transfer starts from, whether a shape or a plan."""

    shape: Transformer
    training: Training | None
    tuned: HParams
    plan: Plan | None
    scale: float
    output: float
    residual: float
    head: float
    betas: tuple[float, float]

    def values(self, role: str, third: str, convention: Convention) -> Values:
        """The base's values of a role, in a third of the depth that has its own (or "")."""
        if self.plan is not None:
            return starred.planned_values(self.plan, role, third)
        return starred.base_values(role, self.shape, self.tuned, convention, third)


def _from_plan(
    base: Plan, tuned: HParams | None, base_training: Training | None, training: Training | None, convention: Convention
) -> _Start:
    if tuned is not None or convention != Convention() or base_training is not None:
        raise ValueError("a base that is a plan brings its own tuned values, training and convention: leave them out")
    if training is not None and base.training is None:
        raise ValueError(
            "training is given, but the base plan has none: plan the base with both trainings, or leave this one out"
        )
    if base.folding is not None:
        raise ValueError("the base plan is folded: transfer from mue.fold.unfold(plan), and fold the result")
    if base.output_multiplier is None:
        raise ValueError("the base plan's blocks differ: there is no single e* to transfer from")
    return _Start(
        base.target,
        base.training,
        base.tuned,
        base,
        base.attention_scale,
        base.output_multiplier,
        base.residual_multiplier,
        base.head_multiplier,
        base.betas,
    )


def _from_shape(
    base: Transformer,
    tuned: HParams | None,
    base_training: Training | None,
    training: Training | None,
    convention: Convention,
) -> _Start:
    if tuned is None:
        raise ValueError("tuned is missing: give mue.HParams(lr, weight_decay, init_std) found on the base")
    if (base_training is None) != (training is None):
        given, lacking = ("training", "base_training") if base_training is None else ("base_training", "training")
        raise ValueError(
            f"{given} is given without {lacking}: give both, or neither for no change of batch or duration"
        )
    scale = convention.scale(base.head_dim)
    return _Start(base, base_training, tuned, None, scale, base.output_multiplier, 1.0, 1.0, tuned.betas)
