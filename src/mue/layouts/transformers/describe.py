"""Roles for every parameter of a ``transformers`` config of any size, observed on a tiny model of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mue.layouts.layout import Layout, pattern_of
from mue.layouts.observe.axis_sizes import Build, parameter_shapes
from mue.layouts.observe.config import size_of
from mue.layouts.observe.decide import Decision, Facts, decide
from mue.layouts.observe.describe import Description, ParamPattern, describe
from mue.layouts.observe.module_flow import ModuleFlow
from mue.layouts.transformers.configs import build
from mue.layouts.transformers.family import Family, family_of
from mue.layouts.transformers.tiny import shrunk_enough


def describe_config(
    config: Any,
    rows: Sequence[Layout] = (),
    build: Build = build,
    forward: Callable[[nn.Module], object] | None = None,
    decide: Callable[[Facts], Decision] = decide,
    watch: Callable[[nn.Module], Mapping[str, ModuleFlow]] | None = None,
    special: Family | None = None,
) -> Description:
    """Roles for every parameter of a transformers config of any size, observed on a tiny model of its family.

    The rows hold for the config's own size. A parameter that only the full model has is undecided. ``forward``, ``decide`` and
    ``watch`` are those of :func:`mue.layouts.observe.describe.describe`; ``special`` is what is special about the family, where that is
    not known by its ``model_type``.

    Raises:
        ValueError: the family cannot be built or run at a tiny size (with its own error); a user's row that fits nothing.
    """
    full = parameter_shapes(build, config)
    wanted = {pattern_of(n) for n in full}
    family = special or family_of(getattr(config, "model_type", ""))
    try:
        tiny = shrunk_enough(
            config,
            lambda c: {pattern_of(n) for n in parameter_shapes(build, c)} if c is not config else wanted,
            family.tiny,
        )
        seen = describe(build, tiny, rows, forward, family.rows, decide, watch)
    except (ValueError, KeyboardInterrupt):
        raise
    except Exception as error:  # a family's own code failed on our tiny config
        text = str(error).splitlines()[0][:160] if str(error) else ""
        raise ValueError(
            f"a tiny {type(config).__name__} could not be built and run ({type(error).__name__}: {text}); give a config"
            " of a small model of this family, or describe it with mue.layouts.observe.describe"
        ) from error
    by_pattern = {f.pattern: f for f in seen.patterns}
    stacked = size_of(config, "experts") or 1
    shapes = {pattern_of(n): shape for n, shape in full.items()}
    missing = "the tiny model has no such parameter"
    patterns = [
        replace(f, shape=shapes[p], row=_restacked(f.row, stacked))
        if (f := by_pattern.get(p)) is not None
        else ParamPattern(p, shapes[p], None, missing)
        for p in shapes
    ]
    return replace(seen, patterns=tuple(patterns))


def _restacked(row: Layout | None, experts: int) -> Layout | None:
    """The row with the full model's number of experts, which an axis that holds one after another does not show."""
    if row is None or not any(a.startswith("expert*") for a in row.axes):
        return row
    return replace(row, stacked=experts)
