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


def active_of(text: str, model: AnyActive) -> tuple[list[int], list[str]]:
    """The k′ that a text asks for: ``1..12``, ``2,4,8``, or in multiples of the trained k, ``1..3k``.

    Returns:
        Them, by size; and a sentence on each kind that is left out of the default, ``1..3k``, which takes what the model can have of it.

    Raises:
        ValueError: no such text, or a k′ asked for by number that the model cannot have.
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
    found = sorted(set(found))
    refused = {k: refusal for k in found if (refusal := _refusal(k, model))}
    if refused and text != DEFAULT:
        raise ValueError(f"--active {text}: {next(iter(refused.values()))[1]}")
    notes = []
    for kind in dict(refused.values()):
        out = [k for k, refusal in refused.items() if refusal[0] == kind]
        notes.append(f"left out: k′ = {', '.join(map(str, out))} ({refused[out[0]][1]})")
    return [k for k in found if k not in refused], notes


def _refusal(k: int, model: AnyActive) -> tuple[str, str] | None:
    """What forbids a k′, and in which words."""
    if not 1 <= k <= model.experts:
        return "experts", f"a token can use 1 to {model.experts} of the {model.experts} experts, not {k}"
    if k % model.groups:
        return "groups", f"every token uses as many of each of {model.groups} groups, which {k} is no multiple of"
    why = model.refusal(k, model.scales[0])
    return None if why is None else ("router", why)


def scales_of(given: Sequence[str], model: AnyActive) -> list[str]:
    """The scales that are asked for, or the model's own; ``ValueError`` for an unknown one."""
    from mue.moe.routers.base import SCALES

    for scale in given:
        if scale not in SCALES:
            raise ValueError(f"--scale {scale!r} is unknown{nearest(scale, SCALES)}")
    return list(dict.fromkeys(given or model.scales))
