"""Auxiliary losses by name: what a plan may name is what ``mue.moe.losses`` has, or a module of yours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mue.util.registry import Registry

AUXILIARY_LOSSES: Registry[Callable[[Any], Any]] = Registry("loss", home="mue.moe.losses")
"""Functions of a ``mue.moe.Routing`` that return a scalar without a coefficient; here so that shapes can tell a wrong name."""
