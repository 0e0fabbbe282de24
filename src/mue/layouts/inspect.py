"""``mue inspect``: everything there is to know about a stock model before a plan touches it. Pure functions, no printing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mue.layouts.diffusers.config import image_classes
from mue.layouts.layout import UNPLANNED, Layout, ParamInfo
from mue.layouts.observe.describe import Description
from mue.layouts.read_shape import look_at
from mue.layouts.sources import source_of
from mue.layouts.transformers import gate_moments as measure
from mue.layouts.transformers.configs import families_with_experts
from mue.layouts.transformers.disk import StoredTensors, compare_stored
from mue.layouts.transformers.gate_moments import Moments
from mue.layouts.transformers.scalings import Scaling, scalings
from mue.layouts.transformers.shape import Routers
from mue.shapes import Transformer
from mue.util.text import text_table


@dataclass(frozen=True)
class InspectionRow:
    """One kind of parameter: its pattern, role (None: undecided), layout, fan-in, how many there are, and why.

    ``shape`` is one tensor's; ``tensors`` counts them, ``parameters`` all their elements.
    """

    pattern: str
    role: str | None
    parts: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    fan_in: int | None
    tensors: int
    parameters: int
    how: str


@dataclass(frozen=True)
class Inspection:
    """A model as ``mue inspect`` shows it.

    Attributes:
        name: of the config's class. rows: one per kind of parameter, in the model's order.
        routing: None where there are no experts. scalings: factors the model already has.
        shape: in mue's numbers; None where it cannot be read, then ``no_shape`` says why.
        undecided: parameters without a role, each with the line to write.
        stored: how the weights of a checkpoint folder compare with its config's model; None where there are none.
    """

    name: str
    rows: tuple[InspectionRow, ...]
    routing: Routers | None
    scalings: tuple[Scaling, ...]
    shape: Transformer | None
    no_shape: str
    undecided: tuple[str, ...]
    stored: StoredTensors | None = None

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """What ``mue inspect --json`` prints."""
        r = self.routing
        return {
            "model": self.name,
            "parameters": self.parameters,
            "undecided": list(self.undecided),
            "rows": [
                {**vars(row), "parts": list(row.parts), "axes": list(row.axes), "shape": list(row.shape)}
                for row in self.rows
            ],
            "routing": None if r is None else {**vars(r), "advice": r.advice},
            "scalings": [{**vars(s), "active": s.active} for s in self.scalings],
            "shape": None if self.shape is None else self.shape.to_dict(),
            "no_shape": self.no_shape,
            "stored": None if self.stored is None else vars(self.stored),
        }


def inspect(
    source: str | Path | Any,
    rows: Sequence[Layout] = (),
    gate_moments: tuple[float, float] | None = None,
    config: str | Path | None = None,
) -> Inspection:
    """Inspect a model by its family, config, checkpoint folder, class or building function.

    Args:
        source, config: see :func:`mue.layouts.sources.source_of`; no weights are built or read.
        rows: the user's own layout rows; they win over what is observed.
        gate_moments: for models whose gates do not sum to one (:func:`mue.layouts.transformers.gate_moments.measure_gates`).

    Raises:
        ValueError: nothing that can be read or run; a user's row that fits no parameter.
    """
    given = source_of(source, rows, config)
    seen = look_at(given)
    description, model, routing = seen.description, seen.model, seen.routing
    shape, why = None, ""
    try:  # the rest of an inspection stands without it
        shape = seen.shape({} if gate_moments is None else {"gate_moments": gate_moments})
    except ValueError as error:
        why = str(error)
    return Inspection(
        given.name,
        _rows(model, description),
        routing,
        tuple(scalings(given.config)) if given.config is not None else (),
        shape,
        why,
        tuple(f.question() for f in description.undecided),
        compare_stored(given.folder, model) if given.folder is not None else None,
    )


def measure_gates(
    source: str | Path | Any,
    rows: Sequence[Layout] = (),
    config: str | Path | None = None,
    *,
    router_std: float | None = None,
) -> Moments:
    """Measure the ``gate_moments`` of a model whose gates do not sum to one (docs/why/index.md#gates).

    Args:
        source, rows, config: as for :func:`inspect`.
        router_std: see :func:`mue.layouts.transformers.gate_moments.measure_gates`, which does it.

    Raises:
        ValueError: a model without a config, or what that function raises.
    """
    given = source_of(source, rows, config)
    if given.config is None:
        raise ValueError(
            f"{given.name} has no config to build its routers from: use mue.layouts.transformers.gate_moments.moments_of"
        )
    return measure.measure_gates(given.config, given.build, given.describe(), router_std=router_std)


def _rows(model: torch.nn.Module, description: Description) -> tuple[InspectionRow, ...]:
    shapes: dict[str, list[tuple[int, ...]]] = {}
    example: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        shapes.setdefault(description.pattern(name), []).append(tuple(p.shape))
        example.setdefault(description.pattern(name), p)
    found = {f.pattern: f for f in description.patterns}
    rows = []
    for pattern, many in shapes.items():
        f = found[pattern]
        fan_in = None
        if f.row is not None and f.row.role != UNPLANNED and "vector" not in f.row.axes:
            fan_in = ParamInfo(pattern, example[pattern], f.row).fan_in
        role, parts, axes = (f.row.role, f.row.parts, f.row.axes) if f.row else (None, (), f.axes)
        rows.append(InspectionRow(pattern, role, parts, axes, many[0], fan_in, len(many), sum(map(prod, many)), f.how))
    return tuple(rows)


def walk(families: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Describe every family with experts, and every class that draws images, at a tiny size, one at a time.

    Args:
        families: by ``model_type``, or ``diffusers.`` and a class; None: all of the installed ``transformers`` with experts, and all of
            the installed ``diffusers`` that draw images.

    Yields:
        ``{family, passed, parameters, undecided, reason}``: ``parameters`` counts the kinds of parameters of the
        family's default config, ``undecided`` lists those without a role.
    """
    for family in [*families_with_experts(), *image_classes()] if families is None else families:
        result: dict[str, Any] = {"family": family, "passed": False, "parameters": 0, "undecided": [], "reason": ""}
        try:
            found = source_of(family).describe()
        except Exception as error:  # one family's own failure must not end the walk
            yield {
                **result,
                "reason": f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
            }
            continue
        undecided = [f.pattern for f in found.undecided]
        reason = "; ".join(dict.fromkeys(f.how for f in found.undecided))
        yield {
            **result,
            "passed": not undecided,
            "parameters": len(found.patterns),
            "undecided": undecided,
            "reason": reason,
        }


def lines(found: Inspection) -> list[str]:
    """An inspection for people: the table of parameters, totals, routers, factors, the shape, and what is undecided.

    Args:
        found: by :func:`inspect`.

    Returns:
        Lines of text; the table is the first of them, with breaks in it.
    """
    header = ("parameter", "role", "axes", "fan-in", "shape", "n", "how")
    table = [
        (
            row.pattern,
            " + ".join(row.parts) or row.role or "?",
            " ".join(row.axes),
            "–" if row.fan_in is None else str(row.fan_in),
            "×".join(map(str, row.shape)),
            str(row.tensors),
            row.how,
        )
        for row in found.rows
    ]
    out = [text_table(header, table), "", f"{found.name}: {found.parameters:,} parameters in {len(table)} kinds"]
    if found.routing is not None:
        r = found.routing
        out.append(f"router: {r.active} active, {r.score or 'scores not seen'}; {r.advice}")
    for s in found.scalings:
        note = f", already scaled: set {s.attribute} = {s.neutral:g} before you plan" if s.active else ""
        out.append(f"factor: {s.attribute} = {s.value:g} on the {s.what}{note}")
    out.append(f"shape: {found.shape.name}" if found.shape is not None else f"no shape: {found.no_shape}")
    if found.stored is not None:
        out += found.stored.lines()
    return [*out, *(f"undecided: {line}" for line in found.undecided)]
