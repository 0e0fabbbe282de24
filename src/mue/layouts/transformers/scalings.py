"""Scaling factors that a stock model already has, by the names its config gives them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mue.layouts.observe.config import find_integer, size_of, text_config
from mue.layouts.observe.names import LAYERS, SCALINGS


@dataclass(frozen=True)
class Scaling:
    """One factor of a config: ``what`` it multiplies, ``value``, and ``neutral``, with which it would do nothing.

    ``neutral`` is None where no number switches it off, or where nothing has to.
    """

    attribute: str
    what: str
    value: float
    neutral: float | None

    @property
    def active(self) -> bool:
        # a root that was copied from our message is not exact
        return self.neutral is not None and not math.isclose(self.value, self.neutral, rel_tol=1e-5)


def scalings(config: Any) -> list[Scaling]:
    """Every scaling factor that a config gives its model, by the attribute's name.

    Args:
        config: of transformers; its language part is read.

    Returns:
        One entry for each attribute that :data:`mue.layouts.observe.names.SCALINGS` knows, also where it does nothing.
    """
    found = []
    for key, value in vars(text_config(config)).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or key.startswith("_"):
            continue
        for pattern, what, neutral in SCALINGS:
            if re.fullmatch(pattern, key):
                found.append(Scaling(key, what, float(value), _number(config, neutral)))
                break
    return found


def _number(config: Any, neutral: float | str | None) -> float | None:
    """The number that switches a factor off; one that the code divides by a size is off at that size."""
    if neutral == "√layers":
        return math.sqrt(find_integer(config, LAYERS) or 1)
    if isinstance(neutral, str):
        size = size_of(config, neutral)
        return None if size is None else float(size)
    return neutral
