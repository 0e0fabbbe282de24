"""Which numbers of active experts, and which scales of their weights, a command is asked for. No torch, for the words are read before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mue.util.errors import nearest

if TYPE_CHECKING:
    from mue.lab.trained.active import AnyActive

DEFAULT = "1..3k"
_PART = re.compile(r"\s*(\d+)(k?)(?:\.\.\.?(\d*)(k?))?\s*")


def is_range(text: str) -> bool:
    """Whether a text is meant as numbers of experts."""
    return bool(text) and all(_PART.fullmatch(part) for part in text.split(","))


def active_of(text: str, model: AnyActive) -> list[int]:
    """The k′ that a text asks for: ``1..12``, ``2,4,8``, or in multiples of the trained k, ``1..3k``.

    The default, ``1..3k``, takes what the model can have of it; what is asked for by number it must have.

    Raises:
        ValueError: no such text, or a k′ that the model cannot have.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None or (match[3] == "" and match[4] != "k"):
            raise ValueError(
                f"--active {text}: write a range (1..12), a list (2,4,8), or multiples of the trained k (1..3k)"
            )
        first = int(match[1]) * (model.trained if match[2] else 1)
        last = first if match[3] is None else int(match[3] or 1) * (model.trained if match[4] else 1)
        if first > last:
            raise ValueError(f"--active {text}: {first} to {last} is no range")
        found += range(first, last + 1)
    if text == DEFAULT:
        return [k for k in found if k <= model.experts and k % model.groups == 0]
    for k in found:
        if not 1 <= k <= model.experts:
            raise ValueError(
                f"--active {text}: a token can use 1 to {model.experts} of the {model.experts} experts, not {k}"
            )
        if k % model.groups:
            raise ValueError(
                f"--active {text}: every token uses as many of each of {model.groups} groups, which {k} is no multiple of"
            )
    return sorted(set(found))


def scales_of(given: Sequence[str], model: AnyActive) -> list[str]:
    """The scales that are asked for, or the model's own; ``ValueError`` for an unknown one."""
    from mue.moe.routers.base import SCALES

    for scale in given:
        if scale not in SCALES:
            raise ValueError(f"--scale {scale!r} is unknown{nearest(scale, SCALES)}")
    return list(dict.fromkeys(given or model.scales))
