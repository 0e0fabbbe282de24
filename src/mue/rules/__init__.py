"""How each hyperparameter scales: one published rule = one table. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from mue.rules.complete_mue import complete_mue, complete_mue_paper
from mue.rules.mup import mup
from mue.rules.standard import standard
from mue.rules.table import ROLES, Row, Rule
from mue.words import nearest

__all__ = ["ROLES", "RULES", "Row", "Rule", "get_rule"]

RULES: dict[str, Callable[..., Rule]] = {
    "complete-mue": complete_mue,
    "complete-mue-paper": complete_mue_paper,
    "mup": mup,
    "standard": standard,
}
_DEPTH = frozenset({"complete-mue", "complete-mue-paper"})


def get_rule(name: str, depth_exponent: Fraction | float | str | None = None) -> Rule:
    """The rule of that name; ``ValueError`` for an unknown name or an option the rule does not have."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}{nearest(name, RULES)}")
    if depth_exponent is None:
        return RULES[name]()
    if name not in _DEPTH:
        raise ValueError(f"rule {name!r} has no depth exponent; drop depth_exponent or use complete-mue")
    try:
        α = Fraction(str(depth_exponent))
    except ValueError:
        raise ValueError(f"depth_exponent must be a number in [1/2, 1], got {depth_exponent!r}") from None
    if not Fraction(1, 2) <= α <= 1:
        raise ValueError(f"depth_exponent must lie in [1/2, 1], got {depth_exponent}")
    return RULES[name](α)
