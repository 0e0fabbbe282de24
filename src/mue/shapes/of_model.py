"""``mue.Dense.of(model)``: the one place where a shape hears from a model. Numbers need no torch, and this folder none of it."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Self


class OfModel:
    """What shapes have in common with no number in it: being read off a model."""

    @classmethod
    def of(cls, model: Any, **said: Any) -> Self:
        """The shape of a model: a torch module, a ``transformers`` model, config or family, or ``"train.py:build"``.

        Widths and experts are counted in its parameters: those it declares (``layout()``) or, with a config to build it again at a
        tiny size, those that are observed. No weights are read.

        Args:
            model: any of these (:func:`mue.layouts.sources.source_of` has all that a name may be).
            said: what no model says (``sequence``), and what this one does not: ``heads``, ``active``, ``router``, ``gate_moments``.
                ``rows``: layout rows of your own. ``config``: a JSON file, for a class that is built from one.

        Raises:
            ValueError: what cannot be read, with the keyword to pass
                (:class:`mue.layouts.transformers.shape.UnreadShapeError` has them in ``fields``); a model of another kind.

        Warns:
            mue.layouts.read_shape.ShapeWarning: what was taken for granted, and factors that the model has of its own.
        """
        # by name: imports point down, and what reads a model lies above the numbers (.importlinter)
        found: Self = import_module("mue.layouts.read_shape").read_shape(model, cls, **said)
        return found
