"""Norms that end a residual branch (sandwich norms): found by doubling projections and seeing whose input doubles.

What such a norm cancels cannot carry a multiplier; its own gain can (docs/why/fold.md). Nothing is concluded from
the names of norms: a norm that reads the residual stream never sees its input doubled exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import Layout, canonical, pattern_of, weights_beside
from mue.rules.roles import ROLES

KINDS = ("o", "down")  # attention's projections back to the residual stream, and the feed-forward's
LOUD = 32.0  # projections are watched at this many times their size, where no norm's epsilon counts
TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Layer:
    """One layer of the tiny model: parameters by pattern, gains by the module that owns them, and the layer itself."""

    module: nn.Module
    weights: Mapping[str, list[tuple[Tensor, float]]]  # with 1 where the code multiplies by 1 + w, else 0
    norms: Mapping[str, nn.Module]


@torch.no_grad()
def post_norms(
    model: nn.Module, run: Callable[[nn.Module], object], rows: Mapping[str, Layout]
) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """What each branch-ending norm comes after, and what is cancelled by anything else.

    Args:
        model: the tiny model, off its start. run: its forward pass. rows: its decided rows, by pattern of names.

    Returns:
        pattern of a norm's gain → the rows' patterns of the projections before it; and the patterns of projections whose
        scale does nothing although no norm's gain was seen to take its place.
    """
    after: dict[str, set[str]] = {}
    lost: set[str] = set()
    for kind in KINDS:
        projections = {pattern for pattern, row in rows.items() if row.role in ROLES and ROLES[row.role].part == kind}
        for layer in _layers(model, rows, projections):
            here = sorted(projections & set(layer.weights))
            found = _ends(model, run, layer, here)
            for norm, before in found.items():
                after.setdefault(norm, set()).update(rows[p].pattern for p in before)
            # what is cancelled with no gain in its place: by a norm without one, or by one that is no module
            covered = set().union(*found.values()) if found else set()
            lost |= {p for p in here if p not in covered and _idle(model, run, layer, here)}
    return {norm: tuple(sorted(before)) for norm, before in after.items()}, frozenset(lost)


def _layers(model: nn.Module, rows: Mapping[str, Layout], projections: set[str]) -> Iterator[_Layer]:
    """The first layer of each make: of those with other parameters."""
    named = {canonical(n): p for n, p in model.named_parameters()}
    modules = {canonical(n): m for n, m in model.named_modules()}
    by_layer: dict[str, dict[str, list[tuple[Tensor, float]]]] = {}
    for name, p in named.items():
        pattern, prefix = pattern_of(name), _prefix(name)
        if prefix and pattern in rows:
            beside = (
                [w for w in weights_beside(name) if w in named and pattern_of(w) in rows]
                if rows[pattern].role == "bias"
                else []
            )
            offset = 1.0 if rows[pattern].role == "norm" and rows[pattern].start == 0 else 0.0
            for one in [pattern, *(pattern_of(w) for w in beside)]:  # a bias is scaled with its weight
                by_layer.setdefault(prefix, {}).setdefault(one, []).append((p, offset))
    seen: set[frozenset[str]] = set()
    for prefix, weights in by_layer.items():
        if not projections & set(weights) or frozenset(weights) in seen:
            continue
        seen.add(frozenset(weights))
        gains = [p for p in weights if rows[p].role == "norm"]
        owners = {g: modules.get(g.replace("*", prefix.rpartition(".")[2], 1).rpartition(".")[0]) for g in gains}
        yield _Layer(modules[prefix], weights, {g: m for g, m in owners.items() if m is not None})


def _ends(
    model: nn.Module, run: Callable[[nn.Module], object], layer: _Layer, here: Sequence[str]
) -> dict[str, set[str]]:
    """Norm → the projections it ends the branch of. A norm after the sum of two normed parts takes the place of theirs."""
    found: dict[str, set[str]] = {}
    with _scaled(layer, here, LOUD):
        before = _norm_inputs(model, run, layer)
        with _scaled(layer, here, 2.0):
            doubled = _doubled(before, _norm_inputs(model, run, layer))
        for pattern in here:
            with _scaled(layer, [pattern], 2.0):
                alone = _norm_inputs(model, run, layer)
            for norm in doubled:
                if _apart(before[norm], alone[norm]) > TOLERANCE:
                    found.setdefault(norm, set()).add(pattern)
        if found:
            with _scaled(layer, list(found), 2.0):
                last = _doubled(before, _norm_inputs(model, run, layer)) - set(found)
            if last:
                return {norm: set().union(*found.values()) for norm in last}
    return found


def _idle(model: nn.Module, run: Callable[[nn.Module], object], layer: _Layer, here: Sequence[str]) -> bool:
    """Whether doubling all the projections leaves the layer's output as it is."""
    with _scaled(layer, here, LOUD):
        before = _norm_inputs(model, run, layer).get("")
        if before is None:  # what it gives on is no tensor that can be compared
            return False
        with _scaled(layer, here, 2.0):
            return _apart(before, _norm_inputs(model, run, layer)[""]) < TOLERANCE


def _doubled(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> set[str]:
    return {n for n, x in now.items() if n and n in before and x.any() and _apart(2 * before[n], x) < TOLERANCE}


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


@contextmanager
def _scaled(layer: _Layer, patterns: Sequence[str], factor: float) -> Iterator[None]:
    """Parameters of some patterns times ``factor``, in this layer; gains as what the code multiplies by."""
    touched = [pair for pattern in patterns for pair in layer.weights[pattern]]
    kept = [p.clone() for p, _ in touched]
    for p, offset in touched:
        p.add_(offset).mul_(factor).sub_(offset)
    try:
        yield
    finally:
        for (p, _), old in zip(touched, kept, strict=True):
            p.copy_(old)


def _norm_inputs(model: nn.Module, run: Callable[[nn.Module], object], layer: _Layer) -> dict[str, Tensor]:
    """Input of each norm of the layer in one forward pass, and under ``""`` what the layer gives on."""
    seen: dict[str, Tensor] = {}

    def entered(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, args[0].detach().clone())

        return hook

    def left(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        # of two streams the last block may give on one only, and None for the other
        first = next((t for t in out if isinstance(t, Tensor)), None) if isinstance(out, tuple) else out
        if isinstance(first, Tensor):
            seen.setdefault("", first.detach().clone())

    handles = [m.register_forward_pre_hook(entered(n)) for n, m in layer.norms.items()]
    handles.append(layer.module.register_forward_hook(left))
    try:
        # the same tokens in every pass, or the passes could not be compared
        torch.manual_seed(1)
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _prefix(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.down_proj.weight``; empty outside the layers."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else ""
