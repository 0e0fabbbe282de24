"""Claims and the runs behind them, read from ``benchmarks/router_claims/*.toml``: a file for each group of claims.

    [arms.elastic]                       # a model and its training: the house's base, changed in these keys
    target = { moe = "16e2a", expert = 32, router = { name = "elastic", pool = 6 } }
    run = { balance = "loss" }           # of Settings; tuned, steps and lr_times (of the transferred rate) likewise
    [claims.range]
    router = "elastic"
    source = "2509.21892"
    claim = "quality does not fall up to twice the trained number"
    seeds = [0, 1, 2]
    effect = 0.02                        # what is expected of the first check, and ...
    half_width = 0.01                    # ... how narrow its interval has to be to decide anything
    checks = [{ of = "elastic.loss@4", minus = "elastic.loss@2", below = 0.005 }]
    controls = [{ of = "top-k.loss@4", minus = "top-k.loss@2", above = 0.005 }]

A value is ``arm.quantity``, or ``arm.quantity@number`` (``claims.quantities``), seed by seed. ``minus`` and ``over``
pair it with another value of the same seed, or with a number. What is predicted of the mean is ``below``, ``above``, ``within`` (of zero,
either way) or ``apart`` (from zero, either way). A control is a statement about runs in which the claim is known not to hold: where it
fails, the measurement could not have seen a failure, and the claim has no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from claims.quantities import QUANTITIES
from mue.lab.data.spec import data_source
from mue.lab.study.shipped import shipped_study
from mue.lab.train.run import Run, Settings
from mue.lab.train.spec import settings_from
from mue.plan.plan import PlanData
from mue.plan.replan import scaled
from mue.plan.toml import check_keys, read_toml, shape_from, table_of, training_from, tuned_from
from mue.plan.transfer import transfer
from mue.shapes import Training
from mue.util.errors import nearest, positive
from mue.util.files import digest

FOLDER = Path(__file__).resolve().parent.parent / "router_claims"
CRITERIA = ("below", "above", "within", "apart")
_ARM = ("target", "run", "tuned", "steps", "lr_times")
_CLAIM = ("router", "source", "claim", "seeds", "effect", "half_width", "checks", "controls")
LEAST_SEEDS = 3
_VALUE = re.compile(r"(?P<arm>.+)\.(?P<quantity>[a-z_]+)(@(?P<number>[\d.]+))?")


@dataclass(frozen=True)
class Value:
    """``arm.quantity`` or ``arm.quantity@number``."""

    arm: str
    quantity: str
    number: float | None = None

    @property
    def name(self) -> str:
        """The quantity, as a row has it."""
        return self.quantity if self.number is None else f"{self.quantity}@{self.number:g}"

    def __str__(self) -> str:
        return f"{self.arm}.{self.name}"


@dataclass(frozen=True)
class Check:
    """A statement about the mean of a value over seeds, or of its pair with another.

    Attributes:
        pair: "" for the value itself, "minus" or "over". other: what it is paired with: a value or a number.
        criterion: of :data:`CRITERIA`. bound: its number.
    """

    of: Value
    pair: str
    other: Value | float
    criterion: str
    bound: float

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.of, self.other) if isinstance(self.other, Value) else (self.of,)


@dataclass(frozen=True)
class Arm:
    """A model and its training, as a table changes the house's base.

    Attributes:
        plan: of the target, its rate multiplied. settings: of its runs, but for the seed.
    """

    name: str
    plan: PlanData
    settings: Settings

    def run(self, seed: int, data: Mapping[str, Any]) -> Run:
        """One of its runs, on a corpus as a run keeps it."""
        return Run(self.plan, replace(self.settings, seed=seed), dict(data))

    def identity(self, seed: int) -> str:
        """16 hex digits that know the run on any corpus: rows of one machine are read on another, whose corpus has other bytes."""
        effective = self._effective
        return digest({**effective, "settings": {**effective["settings"], "seed": seed}})

    @cached_property
    def _effective(self) -> dict[str, Any]:
        return self.run(0, {"hash": ""}).effective

    @property
    def flops(self) -> float:
        """Of one of its runs."""
        training = self.plan.training
        assert training is not None
        return self.plan.target.flops_per_token * training.tokens * (2 if self.settings.consistency else 1)

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens trained on for each active parameter."""
        training = self.plan.training
        assert training is not None
        return training.tokens / self.plan.target.active_parameters


@dataclass(frozen=True)
class Claim:
    """One prediction, its power and how it is judged.

    Attributes:
        group: the file it is of. source: where it is from, an arXiv number. claim: in words.
        effect, half_width: what the first check's value is expected to be about, and the half-width of its interval that is wanted.
    """

    group: str
    name: str
    router: str
    source: str
    claim: str
    seeds: tuple[int, ...]
    effect: float
    half_width: float
    checks: tuple[Check, ...]
    controls: tuple[Check, ...]

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(value for check in (*self.checks, *self.controls) for value in check.values)


@dataclass(frozen=True)
class Claims:
    """All claims with all arms, which claims of a file share.

    Attributes:
        arms: by group and name. all: the claims, in the files' order. source: of the text
            (:func:`mue.lab.data.spec.open_corpus`).
    """

    arms: Mapping[tuple[str, str], Arm]
    all: tuple[Claim, ...]
    source: dict[str, Any]

    def only(self, names: tuple[str, ...]) -> tuple[Claim, ...]:
        """Some claims or groups by name; none for all. ``ValueError`` with the nearest name for an unknown one."""
        known = [*(c.name for c in self.all), *dict.fromkeys(c.group for c in self.all)]
        for name in names:
            if name not in known:
                raise ValueError(f"no claim or group is called {name!r}{nearest(name, known)}")
        return tuple(c for c in self.all if not names or c.name in names or c.group in names)

    @cached_property
    def wanted(self) -> Mapping[str, frozenset[str]]:
        """Identity of each run → names of the quantities that any claim reads of it."""
        found: dict[str, set[str]] = {}
        for claim in self.all:
            for value in claim.values:
                for seed in claim.seeds:
                    found.setdefault(self.arms[claim.group, value.arm].identity(seed), set()).add(value.name)
        return {identity: frozenset(names) for identity, names in found.items()}


def read_claims(folder: Path = FOLDER, base: Path | None = None, cache: Path = Path("runs/data")) -> Claims:
    """Every file of a folder.

    Args:
        base: a file with the tables data, base, tuned and run of what was tuned; None: the house's study.
        cache: where the house's text is kept encoded.

    Raises:
        ValueError: a key, an arm or a quantity that does not exist, numbers that no plan has; the text names file, claim and fix.
    """
    of_base = shipped_study(small=False, cache=cache) if base is None else read_toml(base)
    arms: dict[tuple[str, str], Arm] = {}
    claims: list[Claim] = []
    for path in sorted(folder.glob("*.toml")):
        tables = read_toml(path)
        check_keys(tables, ("arms", "claims"), path.name)
        group = path.stem
        for name, table in table_of(tables, "arms").items():
            arms[group, name] = _arm(name, table, of_base, f"{path.name} [arms.{name}]")
        for name, table in table_of(tables, "claims").items():
            claims.append(
                _claim(group, name, table, [a for g, a in arms if g == group], f"{path.name} [claims.{name}]")
            )
    names = [claim.name for claim in claims]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two claims are called {min(twice)!r}: a name is that of one claim")
    return Claims(arms, tuple(claims), data_source(of_base, base.parent if base else Path()))


def _arm(name: str, table: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Arm:
    check_keys(table, _ARM, where)
    of_base = table_of(base, "base")
    training, target = training_from(of_base, "base"), table_of(table, "target")
    assert training is not None
    drop = ("training", *(("ffn",) if "moe" in target else ()))
    source = shape_from({k: v for k, v in of_base.items() if k != "training"}, "base")
    try:
        plan = transfer(
            source,
            shape_from({**{k: v for k, v in of_base.items() if k not in drop}, **target}, f"arms.{name}.target"),
            tuned_from({**table_of(base, "tuned"), **table_of(table, "tuned")}),
            base_training=training,
            training=Training(training.batch, table.get("steps", training.steps)),
        )
        settings = settings_from({"run": {**table_of(base, "run"), **table_of(table, "run")}})
        return Arm(name, scaled(plan, positive("lr_times", table.get("lr_times", 1))), settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _claim(group: str, name: str, table: Mapping[str, Any], arms: list[str], where: str) -> Claim:
    check_keys(table, _CLAIM, where)
    for key in _CLAIM:
        if key not in table:
            raise ValueError(f"{where} needs {key}")
    seeds = tuple(table["seeds"])
    if len(set(seeds)) < LEAST_SEEDS:
        raise ValueError(f"{where}: seeds = {list(seeds)}: an interval needs at least {LEAST_SEEDS}")
    if not table["checks"] or not table["controls"]:
        raise ValueError(f"{where} needs a check, and a control that a claim which does not hold would show in")
    checks, controls = (tuple(_check(one, arms, where) for one in table[key]) for key in ("checks", "controls"))
    words = {key: str(table[key]) for key in ("router", "source", "claim")}
    power = {key: float(table[key]) for key in ("effect", "half_width")}
    return Claim(group, name, seeds=seeds, checks=checks, controls=controls, **words, **power)


def _check(table: Mapping[str, Any], arms: list[str], where: str) -> Check:
    check_keys(table, ("of", "minus", "over", *CRITERIA), where)
    criteria = [key for key in CRITERIA if key in table]
    pairs = [key for key in ("minus", "over") if key in table]
    if "of" not in table or len(criteria) != 1 or len(pairs) > 1:
        raise ValueError(f"{where}: a check has of, at most one of minus and over, and one of {', '.join(CRITERIA)}")
    other: Value | float = 0.0
    if pairs:
        given = table[pairs[0]]
        other = _value(given, arms, where) if isinstance(given, str) else float(given)
    bound = float(table[criteria[0]])
    return Check(_value(table["of"], arms, where), pairs[0] if pairs else "", other, criteria[0], bound)


def _value(text: str, arms: list[str], where: str) -> Value:
    found = _VALUE.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{where}: {text!r} is no value: write arm.quantity, or arm.quantity@number")
    arm, quantity, number = found["arm"], found["quantity"], found["number"]
    if arm not in arms:
        raise ValueError(f"{where}: {text!r} is of no arm of the file{nearest(arm, arms)}")
    if quantity not in QUANTITIES:
        raise ValueError(f"{where}: {text!r} is no quantity{nearest(quantity, QUANTITIES)}")
    if QUANTITIES[quantity].numbered != bool(number):
        raise ValueError(
            f"{where}: {quantity} {'needs a' if QUANTITIES[quantity].numbered else 'has no'} number after @"
        )
    return Value(arm, quantity, float(number) if number else None)
