"""The laws by name."""

from __future__ import annotations

from collections.abc import Callable

from mue.shapes import Training, Transformer
from mue.util.registry import Registry

Law = Callable[[Transformer, Training], float]
"""The rate that a law gives a shape trained so long, in a unit of its own: only ratios of it are used."""

LAWS: Registry[Law] = Registry("learning-rate law", home="mue.lab.study.laws")
