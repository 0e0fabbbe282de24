"""A shape in mue's numbers, read off a model: what :meth:`mue.Dense.of` and ``mue inspect`` show."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mue.layouts.layout import Layout
from mue.layouts.observe.describe import Description
from mue.layouts.place import place
from mue.layouts.sources import Source, source_of
from mue.layouts.transformers.scalings import scalings
from mue.layouts.transformers.shape import SAID, Routers, UnreadShapeError, routers, shape_of
from mue.shapes import Transformer
from mue.util.errors import nearest

__all__ = ["ShapeWarning", "UnreadShapeError", "look_at", "read_shape"]


class ShapeWarning(UserWarning):
    """A number of a shape was taken for granted, for the model does not say it; the text names it and what to pass."""


@dataclass(frozen=True)
class Seen:
    """A model, every parameter's row, and how its routers weigh experts (None: it has none, or declares its layout)."""

    given: Source
    model: nn.Module
    description: Description
    routing: Routers | None

    def shape(self, said: Mapping[str, Any]) -> Transformer:
        """The shape, with what the user says beside the model.

        Raises:
            ValueError: as :func:`mue.layouts.transformers.shape.shape_of`, and where parameters have no role.
        """
        own = getattr(self.model, "shape", None)
        if self.given.declared is not None and isinstance(own, Transformer):
            free = {name: said[name] for name in ("sequence", "output_multiplier") if name in said}
            for name, value in said.items():
                if name not in free and getattr(own, name, value) != value:
                    raise ValueError(f"{name} is {getattr(own, name)} in the model's own shape, and {value} was passed")
            return replace(own, **free)
        if (
            self.description.undecided
        ):  # a shape is read off roles, and one that is missing may be the very feed-forward
            raise ValueError(
                "some parameters have no role:\n  " + "\n  ".join(f.question() for f in self.description.undecided)
            )
        return shape_of(self.given.config, place(self.model, self.description.layout()), self.routing, said)


def look_at(given: Source) -> Seen:
    """What is observed, or declared, of a model: once, for its shape as for its table."""
    description = given.describe()
    routing = None if given.declared is not None else routers(given.config, description, given.describe)
    return Seen(given, given.model(), description, routing)


def read_shape(
    source: nn.Module | str | Path | Any,
    kind: type[Transformer] = Transformer,
    *,
    rows: Sequence[Layout] = (),
    config: str | Path | None = None,
    **said: Any,
) -> Transformer:
    """The shape of a model.

    Args:
        source: a module (of ``transformers``, with a ``layout()`` of its own, or with a config to build it again), a config,
            or a name as :func:`mue.layouts.sources.source_of` takes it. No weights are read.
        kind: of the shape that is wanted. rows, config: as :func:`mue.layouts.inspect.inspect` takes them.
        said: what the model does not say, by the shape's own names: ``heads``, ``active``, ``sequence``, ...

    Raises:
        UnreadShapeError: what neither the model nor ``said`` has; its ``fields`` are what to pass.
        ValueError: a model of another kind; a keyword that no model leaves open; what cannot be planned.

    Warns:
        ShapeWarning: what was taken for granted.
    """
    for name in said:
        if name not in SAID:
            raise ValueError(f"{name} is read off the model, or is no number of a shape{nearest(name, SAID)}")
    seen = look_at(source_of(source, rows, config))
    shape = seen.shape(said)
    if not isinstance(shape, kind):
        raise ValueError(
            f"{seen.given.name} is a {type(shape).__name__} ({shape.name}), not a {kind.__name__}:"
            f" mue.{type(shape).__name__}.of reads it"
        )
    for note in _taken(seen, shape, said):
        warnings.warn(f"{seen.given.name}: {note}", ShapeWarning, stacklevel=3)
    return shape


def _taken(seen: Seen, shape: Transformer, said: Mapping[str, Any]) -> list[str]:
    """What no model says, or only some do, and what it has of its own that a plan has to hear of."""
    notes = []
    own = seen.given.declared is not None and isinstance(getattr(seen.model, "shape", None), Transformer)
    if "sequence" not in said and not own and shape.image is None:
        notes.append(f"how long its training sequences are is not said, {shape.sequence} is taken: pass sequence=...")
    moe = [block for block in shape.blocks if block.experts]
    if moe and "router" not in said and seen.routing is not None and seen.routing.score is None:
        notes.append("its router's scores were not seen, softmax is taken: pass router=...")
    if moe and seen.routing is None and not own and not {"normalize", "gate_moments"} & set(said):
        notes.append("its experts' weights are taken to sum to one: mue.check measures it; else pass gate_moments=...")
    for s in scalings(seen.given.config) if seen.given.config is not None else ():
        if s.active:
            notes.append(
                f"it multiplies its {s.what} by a factor of its own, {s.attribute} = {s.value:g}, which no shape has: set it to"
                f" {s.neutral:g} before you plan"
            )
    return notes
