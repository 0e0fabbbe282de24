"""The SDE rule as its authors publish it (2605.23893, Table 2), for tests that are about it and not about a rule's defaults."""

from __future__ import annotations

from typing import Any

import mue

SDE: dict[str, Any] = {
    "batch_exponent": "1/2",
    "duration_exponent": "1/2",
    "weight_decay_run": "follows-lr",
    "eps_run": "follows-lr",
    "betas": "linear",
}


def by_sde(rule: str) -> dict[str, Any]:
    """The SDE rule's options, those of them that a rule has."""
    return {name: value for name, value in SDE.items() if name in mue.get_rule(rule).options}
