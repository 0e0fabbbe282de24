"""StepLaw (2503.04715): fitted on 3,700 dense and MoE models, AdamW, one rate for all parameters."""

from __future__ import annotations

from mue.lab.study.laws.registry import LAWS
from mue.shapes import Training, Transformer


@LAWS.register("step-law", place=1)
def step_law(shape: Transformer, training: Training) -> float:
    """η = 1.79 · N^-0.713 · D^0.307, N without embedding and head (of a MoE all experts), D in tokens."""
    size = sum(t.many * t.size for t in shape.tensors() if t.trained and t.role not in ("embedding", "head"))
    return float(1.79 * size**-0.713 * (training.batch * training.steps) ** 0.307)
