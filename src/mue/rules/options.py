"""The choices a rule leaves open: names, meanings, values. A rule has those that its builder takes as keywords, with its defaults.

    OPTIONS.register("window")(Option("w: rates fall only beyond a width of w times the base's", Fraction(1), Fraction(64)))

    @RULES.register("mine")
    def mine(window: Fraction = Fraction(1)) -> Rule: ...

An option that several rules could have stands here; one that only a single rule will ever have is registered in that rule's
file. Either way a name means the same wherever it is given: as a keyword of ``mue.transfer`` and under ``[options]``.

A rule that comes to have an option when plans of it are saved already takes it after a ``*``, and the option says what was
done before: ``Option(..., before=...)``. Files and hashes leave it out at that value, so old ones stay what they are, whatever
the rule's default is then or later.

    def mine(window: Fraction = Fraction(1), *, batch_exponent: Fraction = Fraction(2, 5)) -> Rule: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mue.util.errors import nearest
from mue.util.registry import Registry

OptionValue = Fraction | str | bool


@dataclass(frozen=True)
class Option:
    """One option of a rule: a number from a range, one of some choices, or, where it has neither, yes or no.

    Attributes:
        meaning: what it changes in the table, with its source. low, high: the range. choices: all allowed values.
        before: what rules did before they had the option, for those that came to have it later (see :func:`written`).
    """

    meaning: str
    low: Fraction | None = None
    high: Fraction | None = None
    choices: tuple[str, ...] = ()
    before: OptionValue | None = None

    def parse(self, name: str, value: object) -> OptionValue:
        """``value`` as the rule reads it, numbers as exact fractions.

        Raises:
            ValueError: a value outside the range or the choices, with those.
        """
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}")
            return str(value)
        if self.low is None or self.high is None:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            return value
        try:
            # by way of its text: 0.3 is 3/10 then, and not the binary number nearest to it
            number = None if isinstance(value, bool) else Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            number = None
        if number is None or not self.low <= number <= self.high:
            raise ValueError(f"{name} must be a number in [{self.low}, {self.high}], got {value!r}")
        return number


OPTIONS: Registry[Option] = Registry("option", home="mue.rules")
_SHARED = {
    "depth_exponent": Option(
        "α: both residual branches × ρ_L^-α, rates inside blocks × ρ_L^(α-1) (CompleteP 2505.01618)",
        Fraction(1, 2),  # 1/2 is depth-µP, 1 is CompleteP: the range that Complete(d)P tests (2512.22382)
        Fraction(1),
    ),
    "batch_exponent": Option(
        "p: rates × s = ρ_B^p · ρ_D^-q; 1/2 by theory (SDE, 2205.10287), 7/20 as measured (docs/findings/horizon.md)",
        Fraction(0),
        Fraction(1),
        before=Fraction(1, 2),
    ),
    "duration_exponent": Option(
        "q: rates × s = ρ_B^p · ρ_D^-q; 1/2 by theory (SDE), about 0.3 by 2409.19913, 0 as measured (docs/findings/horizon.md)",
        Fraction(0),
        Fraction(1),
        before=Fraction(1, 2),
    ),
    "weight_decay_run": Option(
        "weight decay under batch and duration × s, which keeps λ/η (2605.23893, Table 2), × (T*/T)/s, which keeps η·λ·T"
        " (2405.13698), or as tuned",
        choices=("follows-lr", "constant-timescale", "unchanged"),
        before="follows-lr",
    ),
    "eps_run": Option(
        "eps under batch and duration × 1/s, which keeps η·ε (2205.10287), or as tuned",
        choices=("follows-lr", "unchanged"),
        before="follows-lr",
    ),
    "betas": Option(
        "1-β × s², which keeps (1-β)/η² (2205.10287), or β^(s²), equal to first order and never outside (0, 1), or"
        " 1-β × T*/T, which keeps (1-β)·T and is the same for p = q = 1/2 (2605.23893, Table 2), or as tuned",
        choices=("linear", "power", "constant-timescale", "unchanged"),
        before="linear",
    ),
    "weight_decay_width": Option(
        "weight decay of hidden matrices × ρ_d (CompleteP), × √ρ_d (2510.15262), or unscaled (the authors' table)",
        choices=("constant-product", "sqrt-width", "none"),
    ),
    "head": Option(
        "output head: multiplier only (CompleteP), or with both width factors as well (the authors' table)",
        choices=("completep", "paper"),
    ),
    "up_gate_correction": Option(
        "experimental: rates of up and gate × (ρ_e/ρ_κ)^-1/2, which removes their drift (docs/why/limits.md#up-and-gate)"
    ),
}
for _place, (_name, _option) in enumerate(_SHARED.items()):
    OPTIONS.register(_name, place=_place)(_option)


def option_names(builder: Callable[..., Any]) -> tuple[str, ...]:
    """The options a rule has: the keywords that its builder takes, which is all that a new rule has to write."""
    return tuple(inspect.signature(builder).parameters)


def resolve(name: str, builder: Callable[..., Any], given: Mapping[str, object]) -> dict[str, OptionValue]:
    """Every option of a rule, as given or by default.

    Args:
        name: the rule's, for messages. builder: the function that makes its table. given: by name; None stands for the default.

    Raises:
        ValueError: an option that does not exist, that this rule does not have, or of a value it cannot take; a builder whose
            keyword is no option.
    """
    signature = inspect.signature(builder).parameters
    for key in signature:
        if key not in OPTIONS:
            raise ValueError(
                f"rule {name!r} takes {key}, and no option has that name: say what it means, beside the rule, with"
                f' OPTIONS.register("{key}")(Option(...)) of mue.rules.options'
            )
    for key, value in given.items():
        if key not in OPTIONS:
            raise ValueError(f"unknown option {key!r}{nearest(key, OPTIONS)}")
        if value is not None and key not in signature:
            has = f"it has {', '.join(signature)}" if signature else "it has none"
            raise ValueError(f"rule {name!r} has no option {key}: {has}; drop {key} or choose another rule")
    resolved: dict[str, OptionValue] = {}
    for key, parameter in signature.items():
        value = given.get(key)
        resolved[key] = parameter.default if value is None else OPTIONS[key].parse(key, value)
    return resolved


def written(builder: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a plan as its file and its hash hold them: without those that stand for what was done before they existed.

    Args:
        builder: the function that makes the rule's table. options: by name, as :func:`as_json` gives them.
    """
    implied = _before(builder)
    return {name: value for name, value in options.items() if name not in implied or value != implied[name]}


def read_back(builder: Callable[..., Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`written` gave, complete again: what is left out is what was done before, never today's default."""
    return _before(builder) | dict(stored)


def _before(builder: Callable[..., Any]) -> dict[str, str | bool]:
    """The options that the rule came to have later → what it did before."""
    later = {k for k, p in inspect.signature(builder).parameters.items() if p.kind is p.KEYWORD_ONLY}
    found = {k: before for k in later if k in OPTIONS and (before := OPTIONS[k].before) is not None}
    return as_json(found)


def as_json(options: Mapping[str, OptionValue]) -> dict[str, str | bool]:
    """Options as JSON holds them.

    Args:
        options: resolved ones of a rule.

    Returns:
        Exponents as exact fractions in text ("1/2"), which no reader rounds; truth values and choices as they are.
    """
    return {k: v if isinstance(v, bool) else str(v) for k, v in options.items()}
