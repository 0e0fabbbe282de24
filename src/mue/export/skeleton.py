"""A stack's model as names and shapes on the meta device, with its layout: enough to plan on, nothing to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mue.export.rows import refuse_images, refuse_trained_alone
from mue.export.stack_model import StackModel
from mue.layouts.layout import HasLayout, Layout, canonical, unwrap
from mue.layouts.of_model import placed
from mue.rules.roles import ROLES
from mue.shapes import Block, Transformer
from mue.util.errors import nearest


class Skeleton(nn.Module):
    """Parameters of given shapes under given dotted names, on the meta device, and the rows that describe them.

    ``own``: the model that says itself what it is, where it is one; what it multiplies by in its forward pass is compared with the plan.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rows: Sequence[Layout], title: str, own: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.rows, self.title, self.multipliers = tuple(rows), title, getattr(own, "multipliers", None)
        self.stacks_own = own is None  # built by the stack, whose initialisation it then has
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))

    def layout(self) -> Sequence[Layout]:
        return self.rows


@dataclass(frozen=True)
class NativeStack:
    """A training stack with models of its own.

    Attributes:
        name: as users call the stack. models: its models by name, the default first.
        others: rows of parameters that a model built by the stack may have besides.
        routers: those of :data:`mue.shapes.routers.ROUTERS` that its code has.
    """

    name: str
    models: Mapping[str, StackModel]
    others: tuple[Layout, ...] = ()
    routers: tuple[str, ...] = ("sigmoid", "softmax")

    def model(self, target: Transformer, given: Any) -> Skeleton:
        """What a plan is written for: a module that the stack built or that describes itself, or one of :attr:`models` by name.

        Raises:
            ValueError: anything else; a router that the stack does not have; what :meth:`named` raises.
        """
        for router in dict.fromkeys(block.router for block in target.blocks if block.experts):
            if router not in self.routers:
                raise ValueError(
                    f"{self.name} has no {router} router, only {' and '.join(self.routers)}: plan with one of those, or"
                    ' export("torch") for a model of your own'
                )
        if target.pool_layers:
            raise ValueError(
                f"{self.name} has experts of its own in every layer, and those of {target.name} lie in pools that layers share:"
                ' export("torch") for a model of your own'
            )
        if isinstance(given, nn.Module):
            return with_rows(given) if isinstance(given, HasLayout) else self.read(target, given)
        if given is not None and not isinstance(given, str):
            raise ValueError(
                f"{self.name} trains models of its own: give a module that it built, or one of {', '.join(self.models)}"
            )
        return self.named(target, given)

    def named(self, target: Transformer, model: str | None = None) -> Skeleton:
        """The planned shape in the names of one of :attr:`models`, by default the first; no stack has to be installed.

        Raises:
            ValueError: an unknown model; a shape that the stack's tensors cannot have.
        """
        name = next(iter(self.models)) if model is None else model
        if name not in self.models:
            raise ValueError(
                f"{self.name} has no model {name!r}{nearest(name, self.models)}; or give file.py:function, which builds yours"
            )
        return shaped(self.models[name], target, f"{name} ({self.models[name].summary})")

    def read(self, target: Transformer, model: nn.Module) -> Skeleton:
        """A model that the stack built, reduced to names and shapes; any device, any parallelism of one rank.

        A name that two rows fit is the one whose planned shape it has.
        """
        rows = self.rows_for(model)
        blocks = target.per_layer
        experts = _experts(target)
        shapes: dict[str, tuple[int, ...]] = {}
        used: dict[str, Layout] = {}
        for raw, parameter in model.named_parameters():
            # frozen ones (a balance bias as a parameter) are nobody's group
            if not parameter.requires_grad:
                continue
            name = canonical(raw)
            shapes[name] = tuple(parameter.shape)
            fits = [(row, m) for row in rows if (m := row.regex.fullmatch(name))]
            for i, (row, match) in enumerate(fits):
                layer = int(match[1]) if match.lastindex else 0
                # a layer too many is refused later, with the model's name, by the match with the plan
                block = blocks[min(layer, len(blocks) - 1)]
                # two models of a stack may use one name for different axes: the planned shape says which it is
                if i == len(fits) - 1 or shape_of(row, target, block) == shapes[name]:
                    used.setdefault(row.pattern, _stacked(row, target, experts))
                    break
        return Skeleton(shapes, _ends(list(used.values())), type(model).__name__)

    def rows_for(self, model: nn.Module) -> list[Layout]:
        """All rows that a module of this stack may have, in the order in which a name is looked up."""
        tables = [row for m in self.models.values() for row in (*m.rows, *m.dense, *m.moe)]
        return list(dict.fromkeys([*tables, *self.others]))


def with_rows(model: HasLayout) -> Skeleton:
    """A model that says itself what its parameters are, where the stack's tables do not know it."""
    assert isinstance(model, nn.Module)
    refuse_trained_alone(model, "a stack's own file")
    planned = [p for p in placed(model) if p.parameter.requires_grad]
    rows = list(dict.fromkeys(p.layout for p in planned))
    shapes = {p.name: tuple(p.parameter.shape) for p in planned}
    return Skeleton(shapes, _ends(rows), type(model).__name__, unwrap(model))


def shaped(kind: StackModel, target: Transformer, title: str) -> Skeleton:
    """The planned shape in the names of a table; ``title`` is the model's name for people.

    Raises:
        ValueError: a shape that the table's tensors cannot have; one that draws images.
    """
    refuse_images(target)
    experts = _experts(target)
    shapes: dict[str, tuple[int, ...]] = {}
    used: dict[str, Layout] = {}
    for row, block, layer in _tensors(kind, target):
        shape = shape_of(row, target, block)
        used[row.pattern] = _stacked(row, target, experts)
        shapes |= dict.fromkeys(_names(row.pattern, layer, block), shape)
    return Skeleton(shapes, list(used.values()), title)


def _ends(rows: list[Layout]) -> list[Layout]:
    """Rows of which ``after`` names only patterns that the model has."""
    patterns = {row.pattern for row in rows}
    return [replace(row, after=tuple(p for p in row.after if p in patterns)) for row in rows]


def _experts(target: Transformer) -> int:
    """Experts of every layer that has some; 0 where layers differ, which tensors with merged axes cannot have."""
    counts = {block.experts for block in target.blocks if block.experts}
    return counts.pop() if len(counts) == 1 else 0


def _stacked(row: Layout, target: Transformer, experts: int) -> Layout:
    if not any(axis.startswith("expert*") for axis in row.axes):
        return row
    if not experts:
        raise ValueError(
            f"{row.pattern} holds all experts along one axis, and the layers of {target.name} differ in their number: plan"
            " with one number of experts, or use another stack"
        )
    return replace(row, stacked=experts)


def _tensors(kind: StackModel, target: Transformer) -> Iterator[tuple[Layout, Block, int]]:
    """(row, its block, its layer) of every tensor but for the experts' index."""
    for layer, block in enumerate(target.per_layer):
        for row in (*kind.rows, *(kind.moe if block.is_moe else kind.dense)):
            here = all(ROLES[role].present(block) for role in (row.planned, *row.parts))
            # experts in a pool lie in no layer: their rows are those that say their layers
            if "*" in row.pattern and here and not (block.pools and ROLES[row.planned].kind == "expert"):
                yield _ungated(row, target), block, layer
    for row in kind.rows:
        if "*" not in row.pattern and not (row.role == "head" and target.tied):
            layer = min(row.layers, default=0)
            yield row, target.per_layer[layer], layer


def _ungated(row: Layout, target: Transformer) -> Layout:
    """Without a gate, a fused gate and up is the up projection."""
    if target.gated or ROLES[row.role].part != "gate" or not row.parts:
        return row
    return Layout(row.pattern, row.parts[1], row.axes)


def _names(pattern: str, layer: int, block: Block) -> list[str]:
    name = pattern.replace("*", str(layer), 1)
    return [name.replace("*", str(i)) for i in range(block.experts)] if "*" in name else [name]


def shape_of(row: Layout, target: Transformer, block: Block) -> tuple[int, ...]:
    """The shape of a row's tensor in a planned model."""
    if ROLES[row.planned].vector:
        return (target.head_dim if row.role == "qk_norm" else target.width,)
    pairs = [fans(role, target, block) for role in row.parts or (row.planned,)]
    sizes = {
        "in": pairs[0][0],
        "out": sum(out for _, out in pairs),
        "expert": 1 if ROLES[row.planned].kind == "shared" else block.experts,
    }
    return tuple(_product(sizes, axis) for axis in row.axes)


def _product(sizes: Mapping[str, int], axis: str) -> int:
    first, _, second = axis.partition("*")
    return sizes[first] * (sizes[second] if second else 1)


def fans(role: str, target: Transformer, block: Block) -> tuple[int, int]:
    """(fan-in, fan-out) of one matrix."""
    d, kind, part = target.width, ROLES[role].kind, ROLES[role].part
    if kind == "embedding":
        return target.vocab, d
    if kind == "head":
        return d, target.vocab
    if kind == "router":
        return d, block.experts
    if kind == "attention":
        kv = target.num_kv_heads * target.head_dim
        return {"q": (d, target.attention_width), "o": (target.attention_width, d)}.get(part, (d, kv))
    hidden = {"ffn": block.ffn, "expert": block.expert, "shared": block.shared_width}[kind] or 0
    return (hidden, d) if part == "down" else (d, hidden)
