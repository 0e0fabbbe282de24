"""Marin's law for its MoE ladder (README of that repository, version 16): fitted on 186 runs of one recipe."""

from __future__ import annotations

from mue.lab.study.laws.registry import LAWS
from mue.shapes import Training, Transformer


@LAWS.register("marin", place=2)
def marin(shape: Transformer, training: Training) -> float:
    """η ∝ d^-0.368 · T^-0.281 · B^0.5, T in tokens, B in tokens a step; the exponent of B is assumed there, not fitted."""
    return float(shape.width**-0.368 * (training.batch * training.steps) ** -0.281 * training.batch**0.5)
