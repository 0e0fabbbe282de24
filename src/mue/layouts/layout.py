"""Every parameter of a torch model gets exactly one role and a declared layout, or the model is refused.

A layout table maps canonical parameter names to a role and to the meaning of each axis. Fan-in comes from that
declaration and never from "the last axis", so fused expert tensors are right by construction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mue.rules.roles import ROLES
from mue.util.errors import explain_calls, nearest

# Wrappers put these in front of, or into, a parameter's name (DDP, torch.compile, FSDP, activation checkpointing).
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# The words for an axis. Which one is summed over only a declaration knows: stacks hold experts as (N, out, in),
# (N, in, out) and (N·in, out) under like names, and code that went by position scaled them wrongly.
AXES = ("in", "out", "expert", "vector", "expert*in", "expert*out")
# Words for a row's role beside those of a plan. What is not planned is left alone by everything here.
POSITION, CONDITION_IN, CONDITION_OUT, UNPLANNED = "position", "condition_in", "condition_out", "unplanned"
# A word that is no plan's own → the role whose values a plan has for it. A table of positions is looked up and added like the
# embedding; it has rows for positions, not for tokens. Captions, pooled texts, sizes and guidance are read as the time is: by a
# matrix whose fan-in no width changes, an input weight (2203.03466, Table 8), and perhaps by one from width to width after it.
PLANNED_AS = {POSITION: "embedding", CONDITION_IN: "time_embedding_in", CONDITION_OUT: "time_embedding_out"}
LAYOUT_ROLES = (*ROLES, *PLANNED_AS, UNPLANNED)
# How the parts of a fused tensor lie along its out axis (Layout.order).
ORDERS = BLOCKS, ROWS, HEADS, UNKNOWN = ("blocks", "rows", "heads", "unknown")
# One dotted part of a name each, but for ** (any number of them).
_STARS = r"(\*\*|\*|\{\w*\})"
_MARKS = ("layer", "stage", "expert")


@explain_calls
@dataclass(frozen=True)
class Layout:
    """Names matching ``pattern`` have ``role``; ``axes`` says what each axis is.

    Attributes:
        pattern: a canonical name in which ``*`` stands for one dotted part, e.g. ``blocks.*.attention.q``. The first ``*`` is the
            layer and the second the expert, unless a marked one says so: ``{layer}``, ``{expert}``, and ``{stage}`` where blocks
            lie in groups, each counted from 0 (``stages.{stage}.blocks.{layer}.up``): layers are then counted through all stages.
            A number where other rows have the layer's star is the layer (``blocks.0.up`` beside ``blocks.*.norm``).
        role: from :data:`mue.rules.roles.ROLES`; or ``"position"``, a learned table of positions; ``"condition_in"`` and
            ``"condition_out"``, what reads a caption or another condition than time and class; or ``"unplanned"``, to leave
            adapters, teachers and placeholders alone: no role, no init, no group (``**`` in such a pattern is any number of parts).
        axes: one word per axis of the tensor: ``in``, ``out``, ``expert`` or ``vector``; ``expert*in`` and
            ``expert*out`` where ``stacked`` experts lie one after another along an axis.
        parts: roles of the matrices fused in this tensor along its out axis (gate-up, qkv); ``role`` is the first.
        start: how the tensor starts where the plan does not draw it: a constant (a gain of 1, or 0 where the code adds
            1 itself), or ``"own"``: as the model's code initialises it (decay rates of a state space, short filters). A matrix is
            drawn, or starts at 0 (a head or queries, as µP advises).
        after: for the gain of a norm that ends a residual branch (sandwich norms): patterns of the projections whose scale
            it cancels. The fold puts the residual multiplier into this gain instead.
        layers: that read the tensor, where it lies in none of them and its name says nothing (a pool of experts).
        order: how the parts lie along the out axis: ``"blocks"``, one after another; ``"rows"``, row by row in turn (``[..., ::2]``);
            ``"heads"``, for each head of keys its queries, its key and its value; ``"unknown"``, which only optimizers ask about that
            move matrices.
    """

    pattern: str
    role: str
    axes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    start: float | str | None = None
    stacked: int = 1
    after: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    order: str = BLOCKS

    def __post_init__(self) -> None:
        # names are compared without what wrappers add, so a row may have it or not: a part called "module" in front, too
        object.__setattr__(self, "pattern", canonical(self.pattern))
        object.__setattr__(self, "after", tuple(canonical(p) for p in self.after))
        for role in (self.role, *self.parts):
            if role not in LAYOUT_ROLES:
                raise ValueError(f"layout {self.pattern!r}: unknown role {role!r}{nearest(role, LAYOUT_ROLES)}")
        if self.parts and self.parts[0] != self.role:
            raise ValueError(f"layout {self.pattern!r}: role is {self.role!r}, but its first part is {self.parts[0]!r}")
        if self.order not in ORDERS:
            raise ValueError(f"layout {self.pattern!r}: unknown order {self.order!r}{nearest(self.order, ORDERS)}")
        if isinstance(self.axes, str):  # ("vector") is no tuple, and would be read letter by letter
            raise ValueError(
                f"layout {self.pattern!r}: axes is the text {self.axes!r}; write ({self.axes!r},), with the comma"
            )
        for axis in self.axes:
            if axis not in AXES:
                raise ValueError(f"layout {self.pattern!r}: unknown axis {axis!r}{nearest(axis, AXES)}")
        if self.after and self.role != "norm":
            raise ValueError(
                f"layout {self.pattern!r}: only a norm's gain can come after projections, not a {self.role}"
            )
        self._check_stars()
        self._check_layers()
        if self.role == UNPLANNED:
            return
        if ROLES[self.planned].drawn and not {"in", "expert*in"} & set(self.axes):
            raise ValueError(f"layout {self.pattern!r}: a {self.role} needs an 'in' axis, its fan-in")
        self._check_start()

    def _check_start(self) -> None:
        if self.start is None:
            return
        if not isinstance(self.start, str):
            object.__setattr__(self, "start", float(self.start))
        if ROLES[self.planned].drawn and self.start != 0:
            raise ValueError(
                f"layout {self.pattern!r}: {self.role} is a matrix, which is drawn or starts at 0, not at {self.start!r}: leave start"
                f" out, or leave the tensor alone with the role {UNPLANNED!r}"
            )
        if isinstance(self.start, str) and self.start != "own":
            raise ValueError(f"layout {self.pattern!r}: start must be a number or 'own', got {self.start!r}")

    def _check_stars(self) -> None:
        marks = re.findall(r"\{(\w*)\}", self.pattern)
        for mark in marks:
            if mark not in _MARKS:
                raise ValueError(
                    f"layout {self.pattern!r}: unknown mark {{{mark}}}; known: {', '.join(f'{{{m}}}' for m in _MARKS)}"
                )
            if marks.count(mark) > 1:
                raise ValueError(f"layout {self.pattern!r}: {{{mark}}} stands in it twice")
        if "stage" in marks and "layer" not in marks:
            raise ValueError(
                f"layout {self.pattern!r}: {{stage}} needs a {{layer}}, the block's number within its stage"
            )
        if "**" in self.pattern and self.role != UNPLANNED:
            raise ValueError(
                f"layout {self.pattern!r}: ** stands for any number of parts, which only {UNPLANNED!r} rows may leave open"
            )

    def _check_layers(self) -> None:
        if self.layers and "layer" in self.stars:
            raise ValueError(
                f"layout {self.pattern!r}: its first star is the layer, and layers says it as well: leave one of them out"
            )
        if list(self.layers) != sorted({int(layer) for layer in self.layers}) or min(self.layers, default=0) < 0:
            raise ValueError(
                f"layout {self.pattern!r}: layers must be whole numbers in rising order, counted from 0, got {self.layers}"
            )

    @property
    def planned(self) -> str:
        """The role whose values a plan has for it."""
        return PLANNED_AS.get(self.role, self.role)

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """For whole names; its groups are the stars, in order."""
        parts = (
            re.escape(p) if i % 2 == 0 else r"(.+)" if p == "**" else r"([^.]+)"
            for i, p in enumerate(re.split(_STARS, self.pattern))
        )
        return re.compile("".join(parts))

    @cached_property
    def stars(self) -> tuple[str, ...]:
        """What each star is: ``layer``, ``stage``, ``expert``, or ``""`` for one that nothing asks for."""
        found = ["*" if p.startswith("*") else p[1:-1] for p in re.findall(_STARS, self.pattern)]
        if "layer" not in found and "*" in found:
            found[found.index("*")] = "layer"
        after = found.index("layer") + 1 if "layer" in found else 0
        if "expert" not in found and "*" in found[after:]:
            found[found.index("*", after)] = "expert"
        return tuple("" if star == "*" else star for star in found)

    def number(self, name: str, star: str) -> int | None:
        """The number that one of the stars stands for in a name that the row matches; None where it is none."""
        match = self.regex.fullmatch(name)
        if match is None or star not in self.stars:
            return None
        text = match[self.stars.index(star) + 1]
        return int(text) if text.isdigit() else None

    def starred(self, name: str, first: int) -> str:
        """A name that the row matches, with ``*`` for its stars from the ``first`` on."""
        match = self.regex.fullmatch(name)
        assert match is not None
        out, at = "", 0
        for i in range(first, len(self.stars)):
            out, at = f"{out}{name[at : match.start(i + 1)]}*", match.end(i + 1)
        return out + name[at:]


@runtime_checkable
class HasLayout(Protocol):
    """A model that declares its own parameters, as ours do."""

    def layout(self) -> Sequence[Layout]: ...


@dataclass(frozen=True)
class ParamInfo:
    """One parameter with its role.

    Attributes:
        name: canonical. layout: its row, which has the axes.
        layers: all that read it, counted through the whole model: of an ordinary tensor the one that it lies in, of shared weights (a
            pool of experts) more; none outside the blocks.
    """

    name: str
    parameter: Tensor
    layout: Layout
    layers: tuple[int, ...] = ()

    @property
    def layer(self) -> int | None:
        """The first of its layers; None outside the blocks."""
        return self.layers[0] if self.layers else None

    @property
    def role(self) -> str:
        """As the plan has it: a table of positions is planned as an embedding (``layout.role`` tells them apart)."""
        return self.layout.planned

    @cached_property
    def expert(self) -> int | None:
        """Which expert the whole tensor belongs to, where experts are modules of their own."""
        return None if self.experts_inside else self.layout.number(self.name, "expert")

    @property
    def experts_inside(self) -> bool:
        """Several experts, or one, lie along an axis of this tensor."""
        return any(axis.startswith("expert") for axis in self.layout.axes)

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
    """A parameter's name without what wrappers add to it (DDP, compile, FSDP, checkpointing).

    Stripped by prefix: ``name.strip("module.")``, as package mup has it, eats letters of the name.
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


def pattern_of(name: str, steps: Collection[str] = ()) -> str:
    """A canonical name with its numbers replaced by ``*``, but for those that end one of the ``steps`` (:func:`chain_steps`)."""
    name = canonical(name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", lambda n: n[0] if name[: n.end()] in steps else "*", name)


def chain_steps(model: nn.Module) -> frozenset[str]:
    """Names of modules whose number says which step of a chain they are, and not which of several alike.

    ``up`` and ``down`` of ``nn.Sequential(up, nn.GELU(), down)`` are such; blocks and experts are not, chained or in a list.
    """
    steps = set()
    for raw, module in model.named_modules():
        numbered = [(n, m) for n, m in module.named_children() if n.isdigit() and _plain(m)]
        makes = [(type(m), [p.shape for p in m.parameters()]) for _, m in numbered]
        for (n, _), make in zip(numbered, makes, strict=True):
            if isinstance(module, nn.Sequential) or (len(makes) > 1 and makes.count(make) == 1):
                steps.add(canonical(f"{raw}.{n}" if raw else n))
    return frozenset(steps)


def _plain(module: nn.Module) -> bool:
    """A single layer, or a chain of such: no block, which has parts of other kinds."""
    return not any(True for _ in module.children()) or (
        isinstance(module, nn.Sequential) and all(map(_plain, module.children()))
    )


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
