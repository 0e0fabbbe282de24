"""How each hyperparameter scales: one published rule = one table. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from mue.rules.complete_d_p import complete_d_p
from mue.rules.complete_mue import complete_mue, complete_mue_paper
from mue.rules.completep import completep
from mue.rules.hidden_ratio_only import hidden_ratio_only
from mue.rules.hyperp import hyperp
from mue.rules.jiang import jiang
from mue.rules.malasnicki import malasnicki
from mue.rules.mssp import mssp_all_scaling, mssp_bottleneck, mssp_fixed_experts
from mue.rules.mup import mup
from mue.rules.options import OPTIONS, OptionValue, option_names, resolve
from mue.rules.standard import standard
from mue.rules.table import AXES, ROLES, Row, Rule
from mue.rules.u_mup import u_mup
from mue.util.errors import nearest

__all__ = ["AXES", "OPTIONS", "ROLES", "RULES", "Row", "Rule", "get_rule", "option_names"]

RULES: dict[str, Callable[..., Rule]] = {
    "complete-mue": complete_mue,
    "complete-mue-paper": complete_mue_paper,
    "completep": completep,
    "complete-d-p": complete_d_p,
    "mup": mup,
    "u-mup": u_mup,
    "malasnicki": malasnicki,
    "jiang": jiang,
    "mssp-fixed-experts": mssp_fixed_experts,
    "mssp-bottleneck": mssp_bottleneck,
    "mssp-all-scaling": mssp_all_scaling,
    "hyperp": hyperp,
    "hidden-ratio-only": hidden_ratio_only,
    "standard": standard,
}


def get_rule(name: str, depth_exponent: object = None, **options: object) -> Rule:
    """The rule of that name; ``ValueError`` for an unknown name or an option the rule does not have (None: default)."""
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"unknown rule {name!r}{nearest(name, RULES)}")
    builder = RULES[name]
    resolved = resolve(name, builder, {"depth_exponent": depth_exponent, **options})
    return _built(builder, tuple(resolved.items()))


@lru_cache(maxsize=256)
def _built(builder: Callable[..., Rule], options: tuple[tuple[str, OptionValue], ...]) -> Rule:
    return replace(builder(**dict(options)), options=dict(options))
