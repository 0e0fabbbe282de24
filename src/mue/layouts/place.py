"""Which row of a layout table each parameter of a model has: exactly one, or the model is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mue.layouts.layout import UNPLANNED, Layout, ParamInfo, canonical, chain_steps, pattern_of
from mue.rules.roles import ROLES


class Placement(NamedTuple):
    """A model's parameters.

    Attributes:
        planned: those with a role. unplanned: by name, those that the table says to leave alone.
        layers: that some parameter lies in, under any of its names.
    """

    planned: list[ParamInfo]
    unplanned: dict[str, Tensor]
    layers: frozenset[int]


class _Hit(NamedTuple):
    """A parameter, its row, and the numbers in its name that count its layer: (stage and) layer, or none; in its other names, too."""

    name: str
    parameter: Tensor
    row: Layout
    address: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]


def place(model: nn.Module, rows: Sequence[Layout]) -> list[ParamInfo]:
    """The planned part of :func:`placement`."""
    return placement(model, rows).planned


def placement(model: nn.Module, rows: Sequence[Layout]) -> Placement:
    """Every parameter with its role, in the model's order; a tied parameter once, under its first name.

    Args:
        model: on any device, wrapped or not.
        rows: its table; a row that matches nothing is an error, for it is a pattern with a slip in it, and experts
            missed in silence are what goes wrong with such tables.

    Raises:
        ValueError: a parameter that no row or more than one row matches, a row that matches nothing, a layout with
            another number of axes than the tensor, a weight that the model computes from others (weight norm, pruning). All
            of a model's faults are listed, not only the first; those that differ in the number of a layer alone as one.
    """
    places = _layer_places(rows)
    table = [_marked(row, places) for row in rows]
    aliases = _aliases(model)
    made = _made_weights(model)
    used: set[int] = set()
    faults: list[str] = []
    hits: list[_Hit] = []
    unknown: dict[str, Tensor] = {}
    for raw, parameter in model.named_parameters():  # yields a tied parameter once
        name = canonical(raw)
        others = aliases.get(id(parameter), ())
        row, fault = _row_of(name, parameter, others, table, used)
        if name in made and (row is None or row.role != UNPLANNED):
            row, fault = None, f"{name} is not the weight that the model multiplies by: {made[name]}"
        if row is None and not fault:
            unknown[name] = parameter
        elif row is None:
            faults.append(fault)
        else:
            other_addresses = tuple(_address(row, n, places) for n in others)
            hits.append(_Hit(name, parameter, row, _address(row, name, places), other_addresses))
    faults += _unknown(model, unknown, table)
    faults += _twice(h.name for h in hits)
    faults += _stage_faults(hits)
    faults += _unknown_after(table)
    faults += [_unmatched(model, row) for i, row in enumerate(rows) if i not in used]
    if faults:
        raise MisfitError("this model's parameters do not fit its layout", faults)
    numbers = _layer_numbers(hits)
    planned = [_info(h, numbers) for h in hits if h.row.role != UNPLANNED]
    return Placement(
        planned,
        {h.name: h.parameter for h in hits if h.row.role == UNPLANNED},
        frozenset(numbers.values()).union(*(p.layers for p in planned)),
    )


def _info(hit: _Hit, numbers: Mapping[tuple[int, ...], int]) -> ParamInfo:
    """A parameter with the layers that its row or its names say; one outside the blocks has none."""
    if not ROLES[hit.row.planned].inside:
        return ParamInfo(hit.name, hit.parameter, hit.row, tuple(numbers[a] for a in (hit.address,) if a in numbers))
    named = {numbers[address] for address in (hit.address, *hit.others) if address}
    return ParamInfo(hit.name, hit.parameter, hit.row, hit.row.layers or tuple(sorted(named)))


def _row_of(
    name: str, parameter: Tensor, aliases: Sequence[str], table: Sequence[Layout], used: set[int]
) -> tuple[Layout | None, str]:
    """The row of one parameter, or None and what is wrong with it (nothing: no row fits); ``used`` gets every row that one of its
    names fits.
    """
    found = [(i, row, other) for other in (name, *aliases) for i, row in enumerate(table) if row.regex.fullmatch(other)]
    used |= {i for i, _, _ in found}
    own = [row for _, row, other in found if other == name]
    if len(own) > 1:
        return None, f"{name} is matched by {len(own)} rows ({', '.join(row.pattern for row in own)}): keep one"
    if not found:
        return None, ""
    row = own[0] if own else found[0][1]
    if row.role == "head":
        # a tied table is the embedding, whichever of its names the model has first: the head is a second use of it
        row = next((row for _, row, _ in found if row.role == "embedding"), row)
    if len(row.axes) != parameter.dim() and not (row.role == UNPLANNED and not row.axes):
        return None, f"{name} has shape {tuple(parameter.shape)}, but {row.pattern!r} declares axes {row.axes}"
    if not own or row is not own[0]:
        # under the name that optimizers, checkpoints and exports see
        row = replace(row, pattern=own[0].pattern if own else name)
    return row, ""


class MisfitError(ValueError):
    """A model that is not what its layout, or its plan, says it is.

    Args:
        lead: what does not fit what. faults: a line each. The text has those once that differ in the number of a layer or an expert alone.

    Attributes:
        faults: every one of them.
    """

    def __init__(self, lead: str, faults: Sequence[str]) -> None:
        super().__init__(f"{lead}:\n  " + "\n  ".join(_alike(faults)))
        self.faults = tuple(faults)


def _alike(faults: Iterable[str]) -> list[str]:
    """The first of the faults that are the same in several layers or experts, with how many there are."""
    groups: dict[str, list[str]] = {}
    for fault in faults:
        groups.setdefault(re.sub(r"(?<![^\s.])\d+(?=\.)", "*", fault), []).append(fault)
    return [one[0] + (f" (and {len(one) - 1} more like it)" if one[1:] else "") for one in groups.values()]


def _unmatched(model: nn.Module, row: Layout) -> str:
    said = f"layout row {row.pattern!r} ({row.role}) matches no parameter"
    buffer = next((name for raw, _ in model.named_buffers() if row.regex.fullmatch(name := canonical(raw))), None)
    if buffer is not None:
        return (
            f"{said}: {buffer} is a buffer, which no optimizer moves and your code starts: it needs no row, remove it"
        )
    return f"{said}: remove it or correct the pattern"


def _layer_places(rows: Sequence[Layout]) -> frozenset[str]:
    """What stands before the layer's star in the rows that have one and count no stages, e.g. ``"blocks."``."""
    return frozenset(
        re.split(r"\{layer\}" if "{layer}" in row.pattern else r"\*", row.pattern)[0]
        for row in rows
        if row.role != UNPLANNED and "layer" in row.stars and "stage" not in row.stars
    )


def _stated(row: Layout, places: frozenset[str]) -> int | None:
    """The layer that a pattern states as a number where other rows of its table have the layer's star: ``blocks.0.up``."""
    numbers = re.finditer(r"(?<=\.)\d+(?=\.)", row.pattern)
    return next((int(n[0]) for n in numbers if row.pattern[: n.start()] in places), None)


def _marked(row: Layout, places: frozenset[str]) -> Layout:
    """A row that states its layer as a number: its first star is not the layer, but the expert."""
    if row.role == UNPLANNED or "{" in row.pattern or "*" not in row.pattern or _stated(row, places) is None:
        return row
    return replace(row, pattern=row.pattern.replace("*", "{expert}", 1))


def _address(row: Layout, name: str, places: frozenset[str]) -> tuple[int, ...]:
    if row.role == UNPLANNED:
        return ()
    if "layer" not in row.stars and (stated := _stated(row, places)) is not None:
        return (stated,)
    numbers = [row.number(name, star) for star in ("stage", "layer") if star in row.stars]
    return () if None in numbers else tuple(n for n in numbers if n is not None)


def _stage_faults(hits: Iterable[_Hit]) -> Iterator[str]:
    """Layers are counted either through stages, all of one kind, or as the names have them."""
    kinds = {
        h.row.pattern.partition("{stage}")[0] if "stage" in h.row.stars else None
        for h in hits
        if h.address and ROLES[h.row.planned].inside
    }
    if len(kinds) > 1:
        shown = ", ".join(sorted(repr(kind) for kind in kinds if kind is not None))
        yield (
            f"layers are counted through the stages of {shown} and otherwise, too: mark {{stage}} and {{layer}} alike in every"
            " row of a block, or in none where {layer} counts through the whole model"
        )


def _layer_numbers(hits: Iterable[_Hit]) -> Mapping[tuple[int, ...], int]:
    """Every address → its layer: the number itself, or its place among all (stage, layer)."""
    found = sorted({address for h in hits for address in (h.address, *h.others) if address})
    staged = any(len(address) > 1 for address in found)
    return {address: i if staged else address[-1] for i, address in enumerate(found)}


def _twice(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield (
                f"{name} is the name of two parameters, once what wrappers add is taken away: call the part that is called"
                " module otherwise"
            )
        seen.add(name)


def _unknown_after(table: Sequence[Layout]) -> list[str]:
    patterns = {row.pattern for row in table}
    return [
        f"layout row {row.pattern!r} comes after {other!r}, which is no row's pattern: write it as that row does"
        for row in table
        for other in row.after
        if other not in patterns
    ]


def _aliases(model: nn.Module) -> Mapping[int, list[str]]:
    """id of a parameter with several names → those after its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    return {i: many[1:] for i, many in names.items() if len(many) > 1}


def _made_weights(model: nn.Module) -> Mapping[str, str]:
    """Parameters of which torch computes a weight before every use → which one, by what, and what to do."""
    found: dict[str, str] = {}
    for raw, module in model.named_modules():
        prefix = f"{raw}." if raw else ""
        made = []
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                parts = [f"parametrizations.{name}.{n}" for n, _ in chain.named_parameters()]
                kind = ", ".join(type(m).__name__.strip("_") for m in chain)
                made.append((name, kind, parts, "torch.nn.utils.parametrize.remove_parametrizations"))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                made.append((hook.name, "WeightNorm", [f"{hook.name}_g", f"{hook.name}_v"], "remove_weight_norm"))
            elif isinstance(hook, SpectralNorm):
                made.append((hook.name, "SpectralNorm", [f"{hook.name}_orig"], "remove_spectral_norm"))
            elif isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                made.append((name, type(hook).__name__, [f"{name}_orig"], "torch.nn.utils.prune.remove"))
        for name, kind, parts, remove in made:
            said = (
                f"{kind} makes {canonical(prefix + name)} of it, so neither the planned init nor the planned rate would hold for"
                f" that: {remove}(module, {name!r}) before you plan, or leave it alone with the role {UNPLANNED!r}"
            )
            found |= {canonical(prefix + part): said for part in parts}
    return found


def _unknown(model: nn.Module, names: Mapping[str, Tensor], table: Sequence[Layout]) -> list[str]:
    steps = chain_steps(model) if names else frozenset()
    return [_without_row(name, p, pattern_of(name, steps), table) for name, p in names.items()]


def _without_row(name: str, parameter: Tensor, pattern: str, table: Iterable[Layout]) -> str:
    close = difflib.get_close_matches(name, [row.pattern for row in table], n=1, cutoff=0.0)
    axes = (
        ("out", "in")
        if parameter.dim() == 2
        else ("expert", "out", "in")
        if parameter.dim() == 3
        else ("vector",) * parameter.dim()
    )
    # a star that was to reach over dots
    short = next((r.pattern for r in table if re.fullmatch(re.escape(r.pattern).replace(r"\*", ".+"), name)), None)
    hint = f" (nearest known: {close[0]!r})" if close else ""
    if short is not None:
        hint = f" (the row {short!r} stops at a dot: one * is one part between dots)"
    return (
        f"{name} {tuple(parameter.shape)} has no role{hint}; add e.g. Layout({pattern!r}, ROLE, {axes}), with ROLE"
        f" {UNPLANNED!r} to leave it alone"
    )
