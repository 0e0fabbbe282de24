"""rule + base + target → Plan: value, factor and reason of every role. Numbers in, numbers out; no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mue.ratios import base_block, ratios, refuse
from mue.rules import get_rule
from mue.rules.table import BUFFERS, FALLBACK, ROLES, VECTORS, Row, Rule, present
from mue.shapes import Block, HParams, Training, Transformer, positive, shape_from_dict
from mue.words import nearest, number, text_table

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELDS = ("init_std", "lr", "weight_decay", "eps")
FORMAT = 1


@dataclass(frozen=True)
class Convention:
    """The base's own habits, declared and never guessed (``[base.convention]``).

    Attributes:
        attention_scale: ``"1/sqrt(d)"`` (head size), ``"1/d"``, or a number: what the base multiplies its logits by.
        weight_decay: ``"decoupled"`` (torch: ``p *= 1 - lr·wd``) or ``"independent"`` (``p *= 1 - wd``).
        depth_scaled_init: the base draws o and down with std/√(2L*).
    """

    attention_scale: str | float = "1/sqrt(d)"
    weight_decay: str = "decoupled"
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        scales = ("1/sqrt(d)", "1/d")
        if isinstance(self.attention_scale, str):
            if self.attention_scale not in scales:
                raise ValueError(f"attention_scale must be one of {scales} or a number, got {self.attention_scale!r}")
        else:
            positive("attention_scale", self.attention_scale)
        forms = ("decoupled", "independent")
        if self.weight_decay not in forms:
            raise ValueError(f"convention weight_decay must be one of {forms}, got {self.weight_decay!r}")
        if not isinstance(self.depth_scaled_init, bool):
            raise ValueError(f"depth_scaled_init must be true or false, got {self.depth_scaled_init!r}")

    def scale(self, head_dim: int) -> float:
        """The base's attention scale as a number."""
        if isinstance(self.attention_scale, str):
            return head_dim**-0.5 if self.attention_scale == "1/sqrt(d)" else 1.0 / head_dim
        return float(self.attention_scale)


@dataclass(frozen=True)
class Values:
    """One role's numbers. None: the role has no such thing (a gain has no init std), or blocks differ in it."""

    init_std: float | None
    lr: float | None
    weight_decay: float | None
    eps: float | None

    def items(self) -> list[tuple[str, float | None]]:
        return [(name, getattr(self, name)) for name in FIELDS]


@dataclass(frozen=True)
class RolePlan:
    """One role of a plan: its values, the factors on the base's values, the formulas behind them and their source."""

    values: Values
    factor: Values
    formula: Mapping[str, str]
    count: int
    source: str
    status: str

    def to_dict(self) -> dict[str, Any]:
        factor = dict(self.factor.items())
        return {
            **dict(self.values.items()),
            "factor": factor,
            "formula": dict(self.formula),
            "count": self.count,
            "source": self.source,
            "status": self.status,
        }


@dataclass(frozen=True)
class BlockPlan:
    """What holds in ``layers`` equal blocks."""

    layers: int
    notation: str
    active_width: int
    output_multiplier: float
    route_scale: float
    drift: Mapping[str, float]
    roles: Mapping[str, RolePlan]

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "roles"}
        return {**out, "drift": dict(self.drift), "roles": {r: p.to_dict() for r, p in self.roles.items()}}


@dataclass(frozen=True)
class Multipliers:
    """Forward multipliers of a model; the default is a stock model.

    Attributes:
        residual: l^-α on both branches of every block. head: on the logits. attention_scale: on q·k
            (None: 1/√head_dim). output: A per layer. route: R per layer.
    """

    residual: float = 1.0
    head: float = 1.0
    attention_scale: float | None = None
    output: tuple[float, ...] = ()
    route: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """All that a plan follows from."""

    base: Transformer | Plan
    target: Transformer
    tuned: HParams | None
    base_training: Training | None
    training: Training | None
    rule: str
    convention: Convention
    depth_exponent: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": {"plan": self.base.inputs.to_dict()} if isinstance(self.base, Plan) else self.base.to_dict(),
            "target": self.target.to_dict(),
            "tuned": None if self.tuned is None else self.tuned.to_dict(),
            "base_training": _training_dict(self.base_training),
            "training": _training_dict(self.training),
            "rule": self.rule,
            "convention": {f.name: getattr(self.convention, f.name) for f in fields(Convention)},
            "depth_exponent": self.depth_exponent,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inputs:
        base, tuned = data["base"], data["tuned"]
        return cls(
            base=Inputs.from_dict(base["plan"]).plan() if "plan" in base else shape_from_dict(base),
            target=shape_from_dict(data["target"]),
            tuned=None if tuned is None else HParams(**{**tuned, "betas": tuple(tuned["betas"])}),
            base_training=None if data["base_training"] is None else Training(**data["base_training"]),
            training=None if data["training"] is None else Training(**data["training"]),
            rule=data["rule"],
            convention=Convention(**data["convention"]),
            depth_exponent=data["depth_exponent"],
        )

    def plan(self) -> Plan:
        """The plan that follows."""
        return transfer(
            self.base,
            self.target,
            self.tuned,
            base_training=self.base_training,
            training=self.training,
            rule=self.rule,
            convention=self.convention,
            depth_exponent=self.depth_exponent,
        )


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

    # ---- on a model ---------------------------------------------------------------------------------------------

    def init_(self, model: nn.Module, seed: int = 0) -> None:
        """Draw every parameter as planned, in place; see :func:`mue.apply.init_`."""
        from mue.apply import init_

        init_(self, model, seed=seed)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups, one per distinct setting; see :func:`mue.apply.param_groups`."""
        from mue.apply import param_groups

        return param_groups(self, model)

    # ---- changed, compared, saved -------------------------------------------------------------------------------

    def retuned(self, **changes: Any) -> Plan:
        """The same transfer from other tuned values (``lr=…, weight_decay=…``), through any chain of plans."""
        if isinstance(self.inputs.base, Plan):
            return replace(self.inputs, base=self.inputs.base.retuned(**changes)).plan()
        return replace(self.inputs, tuned=self.tuned.replace(**changes)).plan()

    def scaled(self, multiplier: float) -> Plan:
        """The same transfer with every tuned learning rate times ``multiplier``."""
        roles = {r: {k: v * multiplier if k == "lr" else v for k, v in t.items()} for r, t in self.tuned.roles.items()}
        return self.retuned(lr=self.tuned.lr * multiplier, roles=roles)

    def to_dict(self) -> dict[str, Any]:
        """What ``mue plan --json`` prints; the meaning of each field is conventions 5."""
        t = self.tuned
        return {
            "format": FORMAT,
            "rule": self.rule.name,
            "hash": self.hash,
            **self._meaning(),
            "unchanged": {
                name: getattr(t, name)
                for name in ("optimizer", "clip", "warmup", "floor", "balance", "z", "bias_speed")
            },
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
        }

    @cached_property
    def hash(self) -> str:
        """16 hex digits over the meaning: inputs and values, not texts, key order or the last bits of a float."""
        data = {"meaning": _without_texts(self._meaning()), "inputs": self.inputs.to_dict()}
        text = json.dumps(_rounded(data), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def diff(self, other: Plan) -> list[tuple[str, Any, Any]]:
        """Every value in which two plans differ: (path, mine, theirs), texts left out."""
        mine, theirs = (_flat(_without_texts({**p._meaning(), "rule": p.rule.name})) for p in (self, other))
        keys = list(dict.fromkeys([*mine, *theirs]))
        return [(k, mine.get(k), theirs.get(k)) for k in keys if _rounded(mine.get(k)) != _rounded(theirs.get(k))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan back; ``ValueError`` if the file is no plan, or its numbers are not those that follow from its inputs."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            plan = Inputs.from_dict(data["inputs"]).plan()
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a saved plan ({error}); write one with plan.save or mue plan --save"
            ) from error
        stored = _rounded(_flat({k: data.get(k) for k in plan._meaning()}))
        ours = _rounded(_flat(plan._meaning()))
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
        base = self.inputs.base
        drift = {k: number(v) if v is not None else "differs by block" for k, v in self.drift.items()}
        lines = [
            ("rule", f"{self.rule.name} ({self.rule.source})"),
            ("base", base.name if isinstance(base, Transformer) else f"plan {base.hash} ({base.target.name})"),
            (
                "target",
                f"{self.target.name}: {self.target.parameters:,} parameters, {self.target.active_parameters:,} active",
            ),
            ("active width", " / ".join(f"{b.active_width} ({b.notation} × {b.layers})" for b in self.blocks)),
            ("output multiplier A", " / ".join(number(b.output_multiplier) for b in self.blocks)),
            ("route scale R", " / ".join(number(b.route_scale) for b in self.blocks)),
            ("residual, head multiplier", f"{number(self.residual_multiplier)}, {number(self.head_multiplier)}"),
            ("attention scale", number(self.attention_scale)),
            ("betas", ", ".join(number(b) for b in self.betas)),
            (
                "drift, reported only",
                f"σ0 experts × {drift['sigma0_experts']}, σ0 others × {drift['sigma0_other']}, up/gate update × {drift['up_gate']}",
            ),
            ("unchanged", ", ".join(f"{k} {v}" for k, v in self.to_dict()["unchanged"].items())),
        ]
        return lines + [("note", note) for note in self.notes] + [("hash", self.hash)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and one line per role present (per block where blocks differ): values, factors, source."""
        header = [
            "role",
            "tensors",
            "init std",
            "lr",
            "weight decay",
            "eps",
            "× std",
            "× lr",
            "× wd",
            "× eps",
            "source",
        ]
        rows = []
        for index, block in enumerate(self.blocks):
            for role, plan in block.roles.items():
                if plan.count and (
                    index == 0
                    or plan.values != self.blocks[0].roles[role].values
                    or not self.blocks[0].roles[role].count
                ):
                    name = role if len(self.blocks) == 1 else f"{role} [{block.notation}]"
                    formulas = [plan.formula.get(f, "–") for f in FIELDS]
                    rows.append(
                        [
                            name,
                            str(plan.count),
                            *(number(v) for _, v in plan.values.items()),
                            *formulas,
                            f"{plan.source} ({plan.status})",
                        ]
                    )
        return header, rows

    def __str__(self) -> str:
        head = "\n".join(f"{what:<26} {value}" for what, value in self.header())
        header, rows = self.table()
        return f"{head}\n\n{text_table(header[:-1], [row[:-1] for row in rows])}"


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
) -> Plan:
    """The target's hyperparameters, from the values tuned on the base.

    Args:
        base: the shape that was tuned, or another plan (its values then take the place of ``tuned``).
        target: the shape to train. Its own ``output_multiplier`` is decided here.
        tuned: the base's values; peak lr, torch's decoupled weight decay unless ``convention`` says otherwise.
        base_training, training: the tuned run and the planned one: both, or neither for no batch or duration change.
        rule: a name from :data:`mue.rules.RULES`. depth_exponent: CompleteP's α in [1/2, 1], 1 by default.
        convention: the base's habits.

    Raises:
        ValueError: naming the number and the fix, for anything the rule cannot answer.

    Source: Complete-muE (arXiv 2605.23893) for the default rule; each row of a plan names its own.
    """
    the_rule = get_rule(rule, depth_exponent)
    convention = convention or Convention()
    if isinstance(base, Plan):
        if tuned is not None or convention != Convention() or base_training is not None:
            raise ValueError(
                "a base that is a plan brings its own tuned values, training and convention: leave them out"
            )
        if training is not None and base.training is None:
            raise ValueError(
                "training is given, but the base plan has none: plan the base with both trainings, or leave this one out"
            )
        shape, from_training = base.target, base.training
        training = training or base.training
        hparams, star, scale, A = base.tuned, base, base.attention_scale, base.output_multiplier
        residual, head, betas = base.residual_multiplier, base.head_multiplier, base.betas
        if A is None:
            raise ValueError("the base plan's blocks differ: there is no single e* to transfer from")
    else:
        if tuned is None:
            raise ValueError("tuned is missing: give mue.HParams(lr, weight_decay, init_std) found on the base")
        if (base_training is None) != (training is None):
            given, lacking = ("training", "base_training") if base_training is None else ("base_training", "training")
            raise ValueError(
                f"{given} is given without {lacking}: give both, or neither for no change of batch or duration"
            )
        shape, from_training, hparams, star = base, base_training, tuned, None
        scale, A, betas = convention.scale(base.head_dim), base.output_multiplier, tuned.betas
        residual = head = 1.0
    _check_roles(hparams)

    shared = ratios(shape, target, target.blocks[0], from_training, training)
    refuse(the_rule, shape, target, shared)
    blocks = tuple(
        _block_plan(
            the_rule,
            shape,
            target,
            block,
            from_training,
            training,
            A,
            lambda role: _base_values(role, shape, hparams, convention, star),
        )
        for block in target.blocks
    )
    plan = Plan(
        inputs=Inputs(
            base,
            target,
            tuned,
            base_training,
            training,
            rule,
            convention,
            None if depth_exponent is None else str(Fraction(str(depth_exponent))),
        ),
        rule=the_rule,
        tuned=hparams,
        target=target,
        training=training,
        blocks=blocks,
        roles=_merge(blocks, target),
        residual_multiplier=residual * the_rule.residual_multiplier(shared),
        head_multiplier=head * the_rule.head_multiplier(shared),
        attention_scale=scale * shape.head_dim / target.head_dim,
        betas=_betas(betas, the_rule.one_minus_beta(shared), from_training, training),
    )
    _check_output_multiplier(target, plan)
    return replace(plan, notes=tuple(_notes(plan, shape)))


def _check_roles(tuned: HParams) -> None:
    for role, values in tuned.roles.items():
        if role not in ROLES or role in BUFFERS:
            raise ValueError(
                f"unknown role {role!r} in tuned.roles{nearest(role, [r for r in ROLES if r not in BUFFERS])}"
            )
        for name in ("init_std", "weight_decay"):
            if role in VECTORS and name in values:
                raise ValueError(
                    f"tuned.roles.{role}.{name}: gains start at 1 and biases at 0, and neither is decayed; leave it out"
                )


def _base_values(role: str, base: Transformer, tuned: HParams, convention: Convention, plan: Plan | None) -> Values:
    """The base's value of one role: from its plan, or the tuned values with the base's own habits applied."""
    if role in BUFFERS:
        return Values(0.0, None, None, None)
    if plan is not None:
        return plan.roles[role].values
    own = {**tuned.roles.get(FALLBACK.get(role, role), {}), **tuned.roles.get(role, {})}
    lr, wd = own.get("lr", tuned.lr), own.get("weight_decay", tuned.weight_decay)
    std = own.get("init_std", tuned.init_std)
    if convention.weight_decay == "independent":
        wd = wd / lr  # torch's form multiplies by lr
    if convention.depth_scaled_init and role.endswith(("_o", "_down")):
        std /= math.sqrt(2 * base.layers)
    if role in VECTORS:
        return Values(None, lr, 0.0, own.get("eps", tuned.eps))
    return Values(std, lr, wd, own.get("eps", tuned.eps))


def _block_plan(
    rule: Rule,
    base: Transformer,
    target: Transformer,
    block: Block,
    base_training: Training | None,
    training: Training | None,
    base_output: float,
    base_values: Any,
) -> BlockPlan:
    counts = target.counts()
    here = {kind: ratios(base, target, block, base_training, training, kind) for kind in ("", "shared")}
    roles: dict[str, RolePlan] = {}
    for role in ROLES:
        row, star = rule.rows[role], base_values(role)
        factor = _factors(row, here["shared" if role.startswith("shared") else ""])
        values = Values(
            *(None if v is None else v * f for (_, v), (_, f) in zip(star.items(), factor.items(), strict=True))
        )  # type: ignore[operator]
        count = counts.get(role, 0) if present(role, block) else 0
        formula = {
            name: str(getattr(row, name)) for name, value in values.items() if value is not None and role not in BUFFERS
        }
        roles[role] = RolePlan(values, factor, formula, count, row.source, row.status)
    common = here[""]
    # σ0 moves with 1/√(tokens seen): all of them, or a routed expert's share of them (conventions 6).
    share = block.share / base_block(base).share
    drift = {
        "sigma0_experts": (common["ρ_D"] * share) ** -0.5,
        "sigma0_other": common["ρ_D"] ** -0.5,
        "up_gate": (common["ρ_e"] / common["ρ_κ"]) ** 0.5,
    }
    A = base_output * rule.output_multiplier(common)
    R = block.route_scale if rule.routed else 1.0
    return BlockPlan(block.layers, block.notation, block.active_width, A, R, drift, roles)


def _factors(row: Row, ratio: Mapping[str, float]) -> Values:
    return Values(row.init_std(ratio), row.lr(ratio), row.weight_decay(ratio), row.eps(ratio))


def _merge(blocks: tuple[BlockPlan, ...], target: Transformer) -> dict[str, RolePlan]:
    """Roles of the whole model: from the blocks that hold them; a value in which those differ becomes None."""
    merged = {}
    for role in ROLES:
        holders = [b.roles[role] for b in blocks if b.roles[role].count] or [b.roles[role] for b in blocks]
        first = holders[0]

        def same(of: str, holders: list[RolePlan] = holders) -> Values:
            found = [{getattr(getattr(h, of), name) for h in holders} for name in FIELDS]
            return Values(*(f.pop() if len(f) == 1 else None for f in found))

        merged[role] = replace(first, values=same("values"), factor=same("factor"))
    return merged


def _betas(
    betas: tuple[float, float], factor: float, base_training: Training | None, training: Training | None
) -> tuple[float, float]:
    """1-β' = (1-β)·ρ_B/ρ_D = (1-β)·T*/T; the domain error speaks of steps, since the batch cancels."""
    if factor == 1:
        return betas
    for i, beta in enumerate(betas):
        if (1 - beta) * factor >= 1 and base_training is not None and training is not None:
            needed = math.floor((1 - beta) * base_training.steps * (1 + 1e-12)) + 1
            raise ValueError(
                f"beta{i + 1} = {beta:g} cannot be carried from {base_training.steps:,} to {training.steps:,} steps:"
                f" (1-β)·T*/T = {(1 - beta) * factor:g} is not below 1; at least {needed:,} steps work"
            )
    return (1 - (1 - betas[0]) * factor, 1 - (1 - betas[1]) * factor)


def _check_output_multiplier(target: Transformer, plan: Plan) -> None:
    declared = target.output_multiplier
    for block in plan.blocks:
        if declared != 1 and not math.isclose(declared, block.output_multiplier, rel_tol=1e-9):
            raise ValueError(
                f"target.output_multiplier = {declared:g}, but the plan decides it and gets {block.output_multiplier:g}: leave it out"
            )


def _notes(plan: Plan, base: Transformer) -> list[str]:
    notes = list(plan.rule.notes)
    target = plan.target
    if target.tied and plan.rule.name == "complete-mue-paper":
        notes.append("tied embeddings: the embedding row wins, and the head multiplier stays on the logits")
    if base.num_heads * target.num_kv_heads != target.num_heads * base.num_kv_heads:
        notes.append("the ratio of kv heads to heads changes: no rule here scales k and v for it (GQA-µP, 2605.15290)")
    if base.gated != target.gated:
        notes.append(
            "gated and plain feed-forwards differ between base and target: no rule covers the change of activation"
        )
    for block in target.blocks:
        if block.active == 1 and block.normalize and block.experts > 1:
            notes.append(
                "a = 1 with normalised gates: the one weight is always 1, so the router gets no gradient from the task"
            )
        if block.gate_moments is not None:
            notes.append(
                f"measured gates: F = {block.gate_variance:.4g}, R = ā/m1 = {block.route_scale:.4g}, down init × κ^-1/2 = {block.kappa**-0.5:.4g}"
            )
    return notes


def _training_dict(training: Training | None) -> dict[str, int] | None:
    return None if training is None else {"batch": training.batch, "steps": training.steps}


def _without_texts(data: Any) -> Any:
    texts = {"source", "status", "formula", "notes"}
    if isinstance(data, Mapping):
        return {k: _without_texts(v) for k, v in data.items() if k not in texts}
    return [_without_texts(v) for v in data] if isinstance(data, list | tuple) else data


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {
            k: v for key, value in data.items() for k, v in _flat(value, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(data, list | tuple):
        return {k: v for i, value in enumerate(data) for k, v in _flat(value, f"{path}[{i}]").items()}
    return {path: data}


def _rounded(data: Any) -> Any:
    """12 significant digits: enough for meaning, blind to the last bits that differ between maths libraries."""
    if isinstance(data, Mapping):
        return {k: _rounded(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(v) for v in data]
    return (
        f"{data:.12g}"
        if isinstance(data, float)
        else f"{data:d}"
        if isinstance(data, int) and not isinstance(data, bool)
        else data
    )


if TYPE_CHECKING:
    _ = torch
