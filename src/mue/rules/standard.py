"""Standard parametrization: every value as tuned, whatever the target. The baseline everything is measured against."""

from __future__ import annotations

from fractions import Fraction

from mue.rules.registry import RULES
from mue.rules.roles import ROLES
from mue.rules.table import PUBLISHED, Row, Rule


@RULES.register("standard", place=14)
def standard() -> Rule:
    """All factors 1, no forward multipliers, the normalised routed sum as it is (R = 1)."""
    row = Row(source="unchanged: what a stock model does", status=PUBLISHED)
    return Rule(
        name="standard",
        title="Standard parametrization",
        source="the default of torch and of every stock model",
        rows=dict.fromkeys(ROLES, row),
        # a stock model leaves its normalised routed sum alone, and divides its logits by √d_head at every head size
        routed=False,
        attention_exponent=Fraction(1, 2),
        baseline=True,
        optimizer="any",
    )
