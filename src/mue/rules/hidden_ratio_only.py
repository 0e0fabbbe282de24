"""What Megatron-Core's ``--use-mup`` does to a MoE: one ratio of hidden sizes for every matrix. The honest baseline.

From its code (core optimizer ``get_mup_config_overrides``): every parameter that is neither one-dimensional nor embedding
nor output takes lr / ρ_d, router and both expert matrices alike, whatever their own fan-in; init by the same ratio; weight
decay is not compensated. Depth, experts, batch and duration change nothing.
"""

from __future__ import annotations

from mue.rules.algebra import ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import AUTHORS_CODE, Row, Rule

d = ratio("ρ_d")


@RULES.register("hidden-ratio-only", place=13)
def hidden_ratio_only() -> Rule:
    """Refuses nothing: that is what makes it a baseline."""
    source = "Megatron-Core --use-mup, optimizer/__init__.py"
    hidden = Row(
        init_std=d ** "-1/2",
        lr=d**-1,
        source=f"{source}: hidden_lr_mult, σ/√m; weight decay left alone",
        status=AUTHORS_CODE,
        unknown=("eps",),
    )
    router = Row(
        init_std=d ** "-1/2",
        lr=d**-1,
        source=f"{source}: a 2-D parameter like any other; init by config.init_method",
        status=AUTHORS_CODE,
        unknown=("eps",),
    )
    rest = Row(source=f"{source}: embedding, output and one-dimensional parameters unscaled", status=AUTHORS_CODE)
    return Rule(
        name="hidden-ratio-only",
        title="Hidden ratio only (Megatron-Core --use-mup)",
        source="Megatron-LM, core/optimizer",
        rows={
            "embedding": rest,
            **dict.fromkeys(of_kind("attention", "ffn", "expert", "shared"), hidden),
            # by the test of that code: two-dimensional, neither embedding nor output
            **dict.fromkeys((n for n in of_kind("patch", "condition", "modulation") if n != "class_embedding"), hidden),
            "class_embedding": rest,
            "router": router,
            "router_bias": Row(source=f"{source}: no optimizer parameter", status=AUTHORS_CODE),
            "norm": rest,
            "qk_norm": rest,
            "bias": rest,
            "final_norm": rest,
            "head": rest,
        },
        # mup_output_mult, the one forward multiplier it has
        head_multiplier=d**-1,
        routed=False,
        baseline=True,
        notes=("a baseline: depth, experts, batch and duration leave every value as it was",),
    )
