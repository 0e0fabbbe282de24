"""Every parameter of a torch model gets exactly one role and a declared layout, or the model is refused.

A layout table maps canonical parameter names to a role and to the meaning of each axis. Fan-in comes from that
declaration and never from "the last axis", so fused expert tensors are right by construction.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mue.rules.roles import ROLES
from mue.util.errors import nearest

# Wrappers put these in front of, or into, a parameter's name (DDP, torch.compile, FSDP, activation checkpointing).
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# The words for an axis. Which one is summed over only a declaration knows: stacks hold experts as (N, out, in),
# (N, in, out) and (N·in, out) under like names, and code that went by position scaled them wrongly (anchors 0).
AXES = ("in", "out", "expert", "vector", "expert*in", "expert*out")


@dataclass(frozen=True)
class Layout:
    """Names matching ``pattern`` have ``role``; ``axes`` says what each axis is.

    Attributes:
        pattern: a canonical name in which ``*`` stands for one dotted part, e.g. ``blocks.*.attention.q``; the first
            ``*`` of a block's parameter is its layer.
        role: from :data:`mue.rules.roles.ROLES`.
        axes: one word per axis of the tensor: ``in``, ``out``, ``expert`` or ``vector``; ``expert*in`` and
            ``expert*out`` where ``stacked`` experts lie one after another along an axis.
        parts: roles of the matrices fused in this tensor along its out axis (gate-up, qkv); ``role`` is the first.
        start: how the tensor starts where the plan does not draw it: a constant (a gain of 1, or 0 where the code adds
            1 itself), or ``"own"``: as the model's code initialises it (decay rates of a state space, short filters).
        after: for the gain of a norm that ends a residual branch (sandwich norms): patterns of the projections whose scale
            it cancels. The fold puts the residual multiplier into this gain instead.
    """

    pattern: str
    role: str
    axes: tuple[str, ...]
    parts: tuple[str, ...] = ()
    start: float | str | None = None
    stacked: int = 1
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in (self.role, *self.parts):
            if role not in ROLES:
                raise ValueError(f"layout {self.pattern!r}: unknown role {role!r}{nearest(role, ROLES)}")
        if self.parts and self.parts[0] != self.role:
            raise ValueError(f"layout {self.pattern!r}: role is {self.role!r}, but its first part is {self.parts[0]!r}")
        if isinstance(self.start, str) and self.start != "own":
            raise ValueError(f"layout {self.pattern!r}: start must be a number or 'own', got {self.start!r}")
        for axis in self.axes:
            if axis not in AXES:
                raise ValueError(f"layout {self.pattern!r}: unknown axis {axis!r}{nearest(axis, AXES)}")
        if self.after and self.role != "norm":
            raise ValueError(
                f"layout {self.pattern!r}: only a norm's gain can come after projections, not a {self.role}"
            )
        if ROLES[self.role].drawn and not {"in", "expert*in"} & set(self.axes):
            raise ValueError(f"layout {self.pattern!r}: a {self.role} needs an 'in' axis, its fan-in")

    @property
    def regex(self) -> re.Pattern[str]:
        return re.compile(
            "".join(r"([^.]+)" if part == "*" else re.escape(part) for part in re.split(r"(\*)", self.pattern))
        )


@runtime_checkable
class HasLayout(Protocol):
    """A model that declares its own parameters, as ours do."""

    def layout(self) -> Sequence[Layout]: ...


@dataclass(frozen=True)
class ParamInfo:
    """One parameter with its role: canonical ``name``, layer (None outside the blocks), axes and shape."""

    name: str
    parameter: Tensor
    layout: Layout
    layer: int | None

    @property
    def role(self) -> str:
        return self.layout.role

    @property
    def gain_offset(self) -> float:
        """1 for a gain that starts at 0, because the code multiplies by ``1 + w``; else 0."""
        return 1.0 if ROLES[self.role].gain and self.layout.start == 0 else 0.0

    def _size(self, axis: str) -> int:
        merged, stacked = f"expert*{axis}", self.layout.stacked
        sizes = zip(self.parameter.shape, self.layout.axes, strict=True)
        return math.prod(n if a == axis else n // stacked for n, a in sizes if a in (axis, merged))

    @property
    def fan_in(self) -> int:
        """Product of the axes declared ``in``, of one expert."""
        return self._size("in")

    @property
    def fan_out(self) -> int:
        return self._size("out")

    @property
    def experts(self) -> int:
        """Experts stacked in this tensor; 1 for an ordinary one."""
        return self._size("expert") * self.layout.stacked


def canonical(name: str) -> str:
    """A parameter's name without what wrappers add to it (DDP, compile, FSDP, checkpointing; conventions 10).

    Stripped by prefix: ``name.strip("module.")``, as package mup has it, eats letters of the name (anchors 1.2).
    """
    changed = True
    while changed:
        changed = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, changed = name.removeprefix(wrapper), True
            # a model may have a submodule called "module" itself: only DDP's, in front, is a wrapper
            elif f".{wrapper}" in name and wrapper != "module.":
                name, changed = name.replace(f".{wrapper}", "."), True
    return name


def pattern_of(name: str) -> str:
    """A canonical name with its numbers replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", canonical(name))


def weights_beside(bias: str) -> tuple[str, ...]:
    """Where the weight that a bias is added to may stand.

    Args:
        bias: a canonical name.

    Returns:
        Names in the order in which to look: ``x.weight`` for ``x.bias``, ``down`` for ``down_bias``.
    """
    stem = bias.removesuffix("bias")
    return tuple(dict.fromkeys((f"{stem}weight", stem.rstrip("._"), f"{stem.rstrip('._')}.weight")))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, ``torch.compile`` and the like, which hide its methods and config.

    Args:
        model: wrapped or not. One that declares a layout is the model, whatever it calls its parts.
    """
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            getattr(model, "module", None) if not isinstance(model, HasLayout) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def place(model: nn.Module, rows: Sequence[Layout]) -> list[ParamInfo]:
    """Every trainable parameter with its role, in the model's order; a tied parameter once, under its first name.

    Args:
        model: on any device, wrapped or not.
        rows: its table; a row that matches nothing is an error, for it is a pattern with a slip in it, and experts
            missed in silence are what goes wrong with such tables (anchors 0).

    Raises:
        ValueError: a parameter that no row or more than one row matches, a row that matches nothing, a layout with
            another number of axes than the tensor. All of a model's faults are listed, not only the first.
    """
    table = list(rows)
    regexes = [row.regex for row in table]
    used: set[int] = set()
    faults: list[str] = []
    placed: list[ParamInfo] = []
    for raw, parameter in model.named_parameters():  # yields a tied parameter once
        name = canonical(raw)
        hits = [(i, m) for i, regex in enumerate(regexes) if (m := regex.fullmatch(name))]
        used |= {i for i, _ in hits}
        if not hits:
            faults.append(_unknown(name, parameter, table))
        elif len(hits) > 1:
            faults.append(
                f"{name} is matched by {len(hits)} rows ({', '.join(table[i].pattern for i, _ in hits)}): keep one"
            )
        elif len(table[hits[0][0]].axes) != parameter.dim():
            row = table[hits[0][0]]
            faults.append(f"{name} has shape {tuple(parameter.shape)}, but {row.pattern!r} declares axes {row.axes}")
        else:
            row, match = table[hits[0][0]], hits[0][1]
            layer = int(match[1]) if match.lastindex and match[1].isdigit() else None
            placed.append(ParamInfo(name, parameter, row, layer))
    patterns = {row.pattern for row in table}
    faults += [
        f"layout row {row.pattern!r} comes after {other!r}, which is no row's pattern: write it as that row does"
        for row in table
        for other in row.after
        if other not in patterns
    ]
    # a row for a tied head matches no parameter of its own, and is right
    aliases = _tied_names(model)
    for i, row in enumerate(table):
        if i not in used and not any(regexes[i].fullmatch(alias) for alias in aliases):
            faults.append(
                f"layout row {row.pattern!r} ({row.role}) matches no parameter: remove it or correct the pattern"
            )
    if faults:
        raise ValueError("this model's parameters do not fit its layout:\n  " + "\n  ".join(faults))
    return placed


def _tied_names(model: nn.Module) -> set[str]:
    """Names under which an already seen parameter appears again."""
    every = {canonical(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    return every - {canonical(n) for n, _ in model.named_parameters()}


def _unknown(name: str, parameter: Tensor, table: Iterable[Layout]) -> str:
    close = difflib.get_close_matches(name, [row.pattern for row in table], n=1, cutoff=0.0)
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    axes = (
        ("out", "in")
        if parameter.dim() == 2
        else ("expert", "out", "in")
        if parameter.dim() == 3
        else ("vector",) * parameter.dim()
    )
    hint = f" (nearest known: {close[0]!r})" if close else ""
    return f"{name} {tuple(parameter.shape)} has no role{hint}; add e.g. Layout({pattern!r}, ROLE, {axes})"


def expert_slices(p: ParamInfo) -> Iterator[tuple[int | None, Tensor]]:
    """The experts in one parameter, one by one.

    Returns:
        (expert index, its slice) of a stacked tensor, or (None, the tensor) of an ordinary one; views, so that writing
        into them writes into the parameter.
    """
    parameter = p.parameter.detach()
    merged = next((i for i, a in enumerate(p.layout.axes) if a.startswith("expert*")), None)
    if merged is not None:
        yield from enumerate(parameter.chunk(p.layout.stacked, merged))
    elif "expert" in p.layout.axes:
        yield from enumerate(parameter.unbind(p.layout.axes.index("expert")))
    else:
        yield None, parameter
