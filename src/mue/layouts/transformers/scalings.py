"""Scaling factors that a stock model already has, by the names its config gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mue.layouts.observe.config import text_config
from mue.layouts.observe.names import SCALINGS


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
        return self.neutral is not None and self.value != self.neutral


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
                found.append(Scaling(key, what, float(value), neutral))
                break
    return found
