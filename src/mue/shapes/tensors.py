"""Every tensor of a shape by role: how many, how large, how often a token meets one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mue.shapes.block import Block
from mue.shapes.image import MODULATIONS, TIME_FEATURES, Image


class Tensors(NamedTuple):
    """The tensors of one role in a shape, or in one kind of its blocks.

    Attributes:
        role: its name (:mod:`mue.rules.roles`). many: how many there are. size: elements of one.
        used: how many products of one token with one of them there are: more than ``many`` where layers share a small pool.
        matrix: they are multiplied with vectors, not met element by element. trained: the optimizer moves them.
        per_image: the products are made once for all tokens of an image, of its time and class.
    """

    role: str
    many: int
    size: int
    used: int
    matrix: bool = True
    trained: bool = True
    per_image: bool = False


class Counted(Protocol):
    """What of a transformer's shape its tensors follow from."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def blocks(self) -> tuple[Block, ...]: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def attention_width(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def tied(self) -> bool: ...
    @property
    def image(self) -> Image | None: ...


def tensors_of(shape: Counted) -> Iterator[Tensors]:
    """Every parameter by role, in the order of the forward pass.

    Experts count one by one, whatever a model stores them in; a tied head is counted at the embedding.
    """
    d, L, image = shape.width, shape.layers, shape.image
    if image is None:
        # a token looks one row up and is multiplied by none of them; a tied table is the head as well, and multiplies
        yield Tensors("embedding", 1, shape.vocab * d, 0 if not shape.tied else 1)
    else:
        yield from _condition(d, image)
    kv = shape.num_kv_heads * shape.head_dim
    for part, out in (("q", shape.attention_width), ("k", kv), ("v", kv), ("o", shape.attention_width)):
        yield Tensors(f"attention_{part}", L, d * out, L)
    if image is not None:
        yield Tensors("modulation", L, MODULATIONS * d * d, L, per_image=True)
    for block in shape.blocks:
        n = block.layers
        if block.ffn is not None:
            yield from _feed_forward("ffn", shape.gated, n, d * block.ffn, n)
        if block.experts:
            # one set for each pool, or for each layer; a token passes a of them in every layer
            many = n // block.readers * block.experts
            yield from _feed_forward("expert", shape.gated, many, d * (block.expert or 0), n * block.active)
            if block.router_kind.matrix:
                yield Tensors("router", n, d * block.experts, n)
            if scalars := len(block.router_kind.scalars):
                yield Tensors("norm", n * scalars, 1, n * scalars, matrix=False)
            if block.router_kind.balance_bias:
                yield Tensors("router_bias", n, block.experts, n, matrix=False, trained=False)
        if block.shared_experts:
            many = n * block.shared_experts
            yield from _feed_forward("shared", shape.gated, many, d * block.shared_width // block.shared_experts, many)
    # one before attention and one before the feed-forward; QK-norm has a gain for q and one for k, shared by heads
    yield Tensors("norm", 2 * L, d, 2 * L, matrix=False)
    yield Tensors("qk_norm", 2 * L, shape.head_dim, 2 * L, matrix=False)
    yield Tensors("final_norm", 1, d, 1, matrix=False)
    if image is not None:
        yield Tensors("final_modulation", 1, 2 * d * d, 1, per_image=True)
        yield Tensors("head", 1, image.patch_elements * d, 1)
    elif not shape.tied:
        yield Tensors("head", 1, shape.vocab * d, 1)


def _condition(d: int, image: Image) -> Iterator[Tensors]:
    """What comes before the blocks of a diffusion transformer: patches, time and class, with one class more for none."""
    yield Tensors("patch_embedding", 1, image.patch_elements * d, 1)
    yield Tensors("time_embedding_in", 1, TIME_FEATURES * d, 1, per_image=True)
    yield Tensors("time_embedding_out", 1, d * d, 1, per_image=True)
    yield Tensors("class_embedding", 1, (image.classes + 1) * d, 0)


def _feed_forward(kind: str, gated: bool, many: int, size: int, used: int) -> Iterator[Tensors]:
    for part in ("up", "gate", "down") if gated else ("up", "down"):
        yield Tensors(f"{kind}_{part}", many, size, used)
