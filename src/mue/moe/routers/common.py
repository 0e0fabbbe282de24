"""What routers that share something have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mue.moe.routers.base import BaseRouter


def one_of_all(routers: Sequence[BaseRouter], names: Sequence[str], otherwise: str) -> list[Any]:
    """The values of some settings, which these routers share.

    Args:
        routers: at least one. names: of the settings. otherwise: what else could be done where they differ.

    Raises:
        ValueError: two of them differ; names the layers and their values.
    """
    first, *others = routers
    for one in others:
        for name in names:
            mine, theirs = (each.options.settings[name] for each in (first, one))
            if mine != theirs:
                raise ValueError(
                    f"layers {first.options.layer} and {one.options.layer} share what their {first.kind.name} routers have in common, and"
                    f" say {name} = {mine!r} and {theirs!r}: give them one value, {otherwise}"
                )
    return [first.options.settings[name] for name in names]
