"""The worked example (2605.23893) as a plan file."""

PLAN = """
rule = "complete-mue"
[base]
width = 128
ffn = 128
layers = 8
[base.training]
batch = 524288
steps = 25000
[tuned]
lr = 1e-3
weight_decay = 0.1
init_std = 0.01
[target]
moe = "128e8a1s"
width = 1024
expert = 1024
layers = 8
[target.training]
batch = 524288
steps = 100000
"""

SHORT = (
    PLAN.replace(
        """[base.training]
batch = 524288
steps = 25000
""",
        "",
    )
    .partition("[target.training]")[0]
    .replace('rule = "complete-mue"\n', "")
)
"""The same with no more than a plan needs."""
