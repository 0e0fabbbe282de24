"""Paths of a pytree with their roles and axes: what a JAX user says of parameters, and how flax and equinox would write ours."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mue.rules.roles import ROLES
from mue.util.errors import nearest

AXES = ("in", "out", "expert", "layer", "vector")
FROZEN = "frozen"  # the role of what no optimizer moves: balance biases, tables of angles
BIASED = tuple(name for name, role in ROLES.items() if role.trained and role.task is None and name != "bias")
"""What a row ``bias of ROLE`` may name: the weights and gains of language models."""
PathRow = tuple[str, str, str] | tuple[str, str, str, float]
"""(path, role, axes), and where a gain starts at 0, because the code adds 1, that 0."""


@dataclass(frozen=True)
class PathStyle:
    """How a library of JAX writes paths and lays out matrices.

    Attributes:
        block: the path of a layer. weight, gain, table: the last part of a projection's, a norm's and an embedding's path.
        axes: of a projection.
    """

    block: str
    weight: str
    gain: str
    table: str
    axes: str


STYLES = {
    "nnx": PathStyle("blocks/{layer}", "kernel", "scale", "embedding", "in out"),
    "linen": PathStyle("blocks_{layer}", "kernel", "scale", "embedding", "in out"),
    "equinox": PathStyle("blocks/{layer}", "weight", "weight", "weight", "out in"),
}


def path_rows(roles: Collection[str], given: Any) -> list[PathRow]:
    """The user's rows, checked as far as that goes without the pytree, or those of a style of path.

    Args:
        roles: that the plan has. given: rows; or the name of one of :data:`STYLES`, None for the first of them.

    Raises:
        ValueError: an unknown style; something else than rows, or a row of another form; an unknown role or axis in one.
    """
    if given is None or isinstance(given, str):
        style = next(iter(STYLES)) if given is None else given
        if style not in STYLES:
            raise ValueError(f"optax has no paths like {style!r}{nearest(style, STYLES)}; or give your own rows")
        return [row for row in _written(STYLES[style]) if row[1] in roles]
    if not isinstance(given, list | tuple) or not all(isinstance(row, list | tuple) for row in given):
        raise ValueError(
            f"for optax give rows (path, role, axes) or one of {', '.join(STYLES)}, and not a {type(given).__name__}: a torch model's"
            " names are no paths of a pytree"
        )
    return [_checked(tuple(row), roles) for row in given]


def _checked(row: tuple[Any, ...], roles: Collection[str]) -> PathRow:
    if len(row) < 3 or row[3:] not in ((), (0,)) or not all(isinstance(text, str) for text in row[:3]):
        raise ValueError(
            f"a row of a layout is (path, role, axes), three texts, and a 0 beside them for a gain that starts at 0: {row!r}"
        )
    if row[0].count("{layer}") > 1:
        raise ValueError(f"layout {row[0]!r}: {{layer}} is the layer's number, once in a path; * is any other part")
    known = dict.fromkeys([*roles, FROZEN, *(f"bias of {weight}" for weight in BIASED)])
    for role in row[1].split("+"):
        if role not in known:
            raise ValueError(f"layout {row[0]!r}: the plan has no role {role!r}{nearest(role, known)}")
    for axis in row[2].split():
        if axis not in AXES:
            raise ValueError(f"layout {row[0]!r}: unknown axis {axis!r}{nearest(axis, AXES)}")
    return row


def _written(s: PathStyle) -> Iterator[PathRow]:
    """A decoder's rows, as the lab's model would be called."""
    parts, b = ("up", "gate", "down"), s.block
    yield f"embedding/{s.table}", "embedding", "in out"
    yield f"{b}/attention_norm/{s.gain}", "norm", "vector"
    for x in "qkvo":
        yield f"{b}/attention/{x}/{s.weight}", f"attention_{x}", s.axes
    for x in "qk":
        yield f"{b}/attention/{x}_norm/{s.gain}", "qk_norm", "vector"
    yield f"{b}/ffn_norm/{s.gain}", "norm", "vector"
    for part in parts:
        yield f"{b}/ffn/{part}/{s.weight}", f"ffn_{part}", s.axes
    yield f"{b}/moe/router/{s.weight}", "router", s.axes
    for part in parts:
        yield f"{b}/moe/experts_{part}", f"expert_{part}", f"expert {s.axes}"
    for part in parts:
        yield f"{b}/moe/shared_{part}", f"shared_{part}", s.axes
    yield f"final_norm/{s.gain}", "final_norm", "vector"
    yield f"head/{s.weight}", "head", s.axes
