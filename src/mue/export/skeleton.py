"""A stack's model as names and shapes on the meta device, with its layout: enough to plan on, nothing to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from mue.export.stacks import STACKS, StackModel, norms_last, post_normed
from mue.layouts.layout import HasLayout, Layout, canonical
from mue.rules.roles import ROLES
from mue.shapes import Block, Transformer
from mue.util.errors import nearest


class Skeleton(nn.Module):
    """Parameters of given shapes under given dotted names, on the meta device, and the rows that describe them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], rows: Sequence[Layout], what: str) -> None:
        super().__init__()
        self.rows, self.what = tuple(rows), what
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


def skeleton(stack: str, target: Transformer, model: str | None = None) -> Skeleton:
    """The planned shape in a stack's own names; no stack has to be installed.

    Args:
        stack: of :data:`mue.export.stacks.STACKS`. model: one of its models, by default the first.

    Raises:
        ValueError: an unknown model; a shape that the stack's tensors cannot have.
    """
    models = STACKS[stack].models
    name = next(iter(models)) if model is None else model
    if name not in models:
        raise ValueError(
            f"{stack} has no model {name!r}{nearest(name, models)}; or give file.py:function, which builds yours"
        )
    kind = models[name]
    experts = _experts(target)
    shapes: dict[str, tuple[int, ...]] = {}
    used: dict[str, Layout] = {}
    for row, block, layer in _placed(kind, target):
        shape = shape_of(row, target, block)
        used[row.pattern] = _stacked(row, target, experts)
        shapes |= dict.fromkeys(_names(row.pattern, layer, block), shape)
    return Skeleton(shapes, list(used.values()), f"{name} ({kind.what})")


def read(stack: str, target: Transformer, model: nn.Module) -> Skeleton:
    """A model that the stack built, reduced to names and shapes; any device, any parallelism of one rank.

    A name that two rows fit is the one whose planned shape it has.

    Raises:
        ValueError: blocks in which the order of norms is none that the fold knows.
    """
    rows = list(dict.fromkeys(STACKS[stack].every))
    if stack == "olmo-core" and norms_last(model):
        rows = post_normed(rows)
    blocks = target.per_layer
    experts = _experts(target)
    shapes: dict[str, tuple[int, ...]] = {}
    used: dict[str, Layout] = {}
    for raw, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = canonical(raw)
        shapes[name] = tuple(parameter.shape)
        fits = [(row, m) for row in rows if (m := row.regex.fullmatch(name))]
        for i, (row, match) in enumerate(fits):
            layer = int(match[1]) if match.lastindex else 0
            block = blocks[min(layer, len(blocks) - 1)]
            if i == len(fits) - 1 or shape_of(row, target, block) == shapes[name]:
                used.setdefault(row.pattern, _stacked(row, target, experts))
                break
    return Skeleton(shapes, _ends(list(used.values())), type(model).__name__)


def with_rows(model: HasLayout) -> Skeleton:
    """A model that says itself what its parameters are, where the stack's tables do not know it."""
    assert isinstance(model, nn.Module)
    shapes = {canonical(n): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return Skeleton(shapes, model.layout(), type(model).__name__)


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


def _placed(kind: StackModel, target: Transformer) -> Iterator[tuple[Layout, Block, int]]:
    """(row, its block, its layer) of every tensor but for the experts' index."""
    for layer, block in enumerate(target.per_layer):
        for row in (*kind.rows, *(kind.moe if block.is_moe else kind.dense)):
            if "*" in row.pattern and all(ROLES[role].present(block) for role in (row.role, *row.parts)):
                yield _ungated(row, target), block, layer
    for row in kind.rows:
        if "*" not in row.pattern and not (row.role == "head" and target.tied):
            yield row, target.blocks[0], 0


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
    if ROLES[row.role].vector:
        return (target.head_dim if row.role == "qk_norm" else target.width,)
    pairs = [_fans(role, target, block) for role in row.parts or (row.role,)]
    sizes = {
        "in": pairs[0][0],
        "out": sum(out for _, out in pairs),
        "expert": 1 if ROLES[row.role].kind == "shared" else block.experts,
    }
    return tuple(_product(sizes, axis) for axis in row.axes)


def _product(sizes: Mapping[str, int], axis: str) -> int:
    first, _, second = axis.partition("*")
    return sizes[first] * (sizes[second] if second else 1)


def _fans(role: str, target: Transformer, block: Block) -> tuple[int, int]:
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
