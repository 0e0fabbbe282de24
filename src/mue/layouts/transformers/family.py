"""What is special about one model family of ``transformers``: most need nothing, the others one file each.

    @FAMILIES.register("dbrx")  # its model_type
    def dbrx() -> Family: ...

Ours lie in ``mue.layouts.transformers.families``. A class of your own with a config that has a ``model_type`` is a family, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mue.layouts.layout import Layout
from mue.util.registry import Registry


@dataclass(frozen=True)
class Family:
    """What observation cannot know of a family.

    Attributes:
        defaults: what the family's default config leaves open, so that it is a model with experts at all. nested_defaults: the
            same in the configs that are nested in it.
        tiny: attributes that the family's own code needs in a tiny model, wherever in the config they stand.
        rows: for parameters whose role cannot be decided. A user's own rows win over them.
        attention_scale: what the family's code multiplies q·k by, where it is not 1/√(head size) and no module says so.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    nested_defaults: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Layout, ...] = ()
    attention_scale: float | None = None


FAMILIES: Registry[Callable[[], Family]] = Registry("model family", home="mue.layouts.transformers.families")


def family_of(model_type: str) -> Family:
    """What is special about a family; of one that nobody registered, nothing."""
    special = FAMILIES.get(model_type)
    return Family() if special is None else special()
