"""Learning-rate laws that others fitted, as factors on the base's rate: what a study sets beside the rules.

A law of this kind knows sizes and tokens only and gives one rate for everything, so it is used on standard parametrization. Its
constants belong to other models, tokenizers and schedules; taken as a ratio to the tuned base only its exponents are left, which is
the kinder reading.
"""

from __future__ import annotations

from collections.abc import Callable

from mue.shapes import Training, Transformer
from mue.util.registry import Registry

Law = Callable[[Transformer, Training], float]
"""The rate that a law gives a shape trained so long, in its own unit: only ratios of it are used."""

LAWS: Registry[Law] = Registry("learning-rate law", home="mue.lab.study")


def _non_embedding(shape: Transformer) -> int:
    return sum(t.many * t.size for t in shape.tensors() if t.trained and t.role not in ("embedding", "head"))


@LAWS.register("step-law")
def step_law(shape: Transformer, training: Training) -> float:
    """η = 1.79 · N^-0.713 · D^0.307, N without embeddings (of a MoE all experts), D in tokens (2503.04715, AdamW)."""
    return 1.79 * _non_embedding(shape) ** -0.713 * float(training.batch * training.steps) ** 0.307


@LAWS.register("marin")
def marin(shape: Transformer, training: Training) -> float:
    """η ∝ d^-0.368 · T^-0.281 · B^0.5, T in tokens, B in tokens a step (Marin's MoE ladder, v16; B's exponent is assumed there)."""
    tokens = float(training.batch * training.steps)
    return float(shape.width**-0.368 * tokens**-0.281 * training.batch**0.5)
