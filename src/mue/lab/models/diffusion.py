"""The diffusion transformer of the lab (DiT, 2212.09748): patches of a noised image in, their velocity out, each block dense or with experts.

It shares attention, feed-forward networks, experts and routers with the language model, and is built as that is: from a shape (numbers)
and the forward multipliers of a plan. Every block is conditioned on time and class by adaLN-zero: its norms are shifted and scaled, and its
branches gated, by six vectors that start at 0, so that each block starts as the identity. RMSNorm stands in the place of DiT's LayerNorm,
and places are fixed sines in two dimensions.

Shape suffixes: B images, T patches of an image, D width, P numbers of a patch, C channels, H and W pixels. Stacked variants are a leading
axis of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.lab.models.layers import Attention, Embedding, Linear, RMSNorm
from mue.lab.models.ops import scaled
from mue.lab.models.output import Output
from mue.lab.models.parts import auxiliary, block_rows, checked_multipliers, feed_forward_of, pools_of, routers_in
from mue.lab.models.residual import add_attention, add_experts, add_feed_forward, modulated
from mue.layouts.layout import Layout
from mue.moe import ExpertPool, Routing
from mue.moe.layer import self_changing
from mue.moe.routers.base import Balance, RouterInput, RouterOptions, share
from mue.plan.values import Multipliers
from mue.shapes import Block, Image, Transformer
from mue.shapes.image import LONGEST, MODULATIONS, TIME_FEATURES

TIME_SCALE = 1000.0  # of t in [0, 1], so that the sines see the range that DiT's steps have


class DiffusionBlock(nn.Module):
    """x + l^-α · g₁ · attention(m₁(norm x)), then x + l^-α · g₂ · feed-forward(m₂(norm x)), with m(n) = n · (1 + scale) + shift.

    Args:
        shape: of the whole model. block, layer: what this one is, and the how many-th.
        multipliers: the plan's. options: what the run says to the router.
        pool: the experts that it reads together with other layers, where they lie in a pool.
    """

    def __init__(
        self,
        shape: Transformer,
        block: Block,
        multipliers: Multipliers,
        layer: int,
        options: RouterOptions,
        pool: ExpertPool | None = None,
    ) -> None:
        super().__init__()
        self.residual = multipliers.residual
        self.modulation = Linear(shape.width, MODULATIONS * shape.width)
        self.attention_norm = RMSNorm(shape.width)
        self.attention = Attention(shape, multipliers.attention_scale)
        self.ffn_norm = RMSNorm(shape.width)
        self.ffn, self.moe = feed_forward_of(shape, block, multipliers, layer, options, pool)

    def forward(self, x_BTD: Tensor, c_BD: Tensor, given: RouterInput | None = None) -> tuple[Tensor, Routing | None]:
        """One block; c_BD is the condition after its activation."""
        first, second = self.modulation(c_BD).chunk(2, -1)  # each a shift, a scale and a gate
        x_BTD = add_attention(x_BTD, self.attention_norm, self.attention, self.residual, modulation=first)
        if self.moe is not None:
            return add_experts(x_BTD, self.ffn_norm, self.moe, self.residual, given, second)
        assert self.ffn is not None
        return add_feed_forward(x_BTD, self.ffn_norm, self.ffn, self.residual, second), None


class DiffusionModel(nn.Module):
    """The velocity field of a rectified flow over images of ``shape``, with the forward ``multipliers`` of a plan (default: stock).

    Args:
        shape: with an ``image``. multipliers: ``plan.multipliers``.
        balance: how experts are balanced: ``"bias"`` (aux-loss-free), ``"loss"`` or ``"none"``.
        z_loss: also compute the router z-loss. seed: of routers that draw, or that are drawn once.

    Raises:
        ValueError: a shape without an image, or of a width that two axes of sines do not divide; multipliers for another number of
            layers; a router that reads words.
    """

    places: Tensor

    def __init__(
        self,
        shape: Transformer,
        multipliers: Multipliers | None = None,
        *,
        balance: Balance = "bias",
        z_loss: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if shape.image is None:
            raise ValueError(f"{shape.name} draws no images: give it image = mue.Image(size, channels, patch, classes)")
        multipliers = checked_multipliers(shape, multipliers)
        kinds = [block.router_kind for block in shape.blocks if block.experts]
        if reading := [kind.name for kind in kinds if kind.needs_tokens]:
            raise ValueError(f"the {reading[0]} router reads token ids, and patches of images have none: take another")
        self.shape, self.multipliers, self.image = shape, multipliers, shape.image
        options, D = RouterOptions(balance=balance, z_loss=z_loss, seed=seed), shape.width
        self.patch_embedding = Linear(shape.image.patch_elements, D)
        self.time_in, self.time_out = Linear(TIME_FEATURES, D), Linear(D, D)
        self.class_embedding = Embedding(shape.image.classes + 1, D)
        self.register_buffer("places", place_table(shape.image, D), persistent=False)
        pools, made = pools_of(shape)
        if made:
            self.pools = made
        self.blocks = nn.ModuleList(
            DiffusionBlock(shape, block, multipliers, layer, replace(options, pool=i), pool)
            for layer, (block, (i, pool)) in enumerate(zip(shape.per_layer, pools, strict=True))
        )
        if (common := share(routers_in(self.blocks))) is not None:
            self.common = common
        self.final_norm = RMSNorm(D)
        self.final_modulation = Linear(D, 2 * D)
        self.head = Linear(D, shape.image.patch_elements)

    @property
    def unconditional(self) -> int:
        """The class of none, which training puts in the place of some labels and guidance asks for."""
        return self.image.classes

    def forward(self, x_BCHW: Tensor, time_B: Tensor, class_B: Tensor, velocity_BCHW: Tensor | None = None) -> Output:
        """The velocity at noised images, and its mean squared error where the true one is given.

        Args:
            x_BCHW: images on their way, x_t. time_B: t, 0 at the image and 1 at the noise. class_B: what they are to be, with
                :attr:`unconditional` for no class. velocity_BCHW: noise − image.

        Raises:
            ValueError: images of another size than the shape's.
        """
        image = self.image
        if x_BCHW.shape[-3:] != (image.channels, image.size, image.size):
            raise ValueError(
                f"images of {tuple(x_BCHW.shape[-3:])}, the model was built for ({image.channels}, {image.size}, {image.size})"
            )
        x_BTD = self.patch_embedding(patches(x_BCHW, image)) + self.places
        c_BD = F.silu(self.condition(time_B, class_B))
        routings = []
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, c_BD)
            if routing is not None and routing.num_experts:
                routings.append(routing)
        shift, scale = self.final_modulation(c_BD).unsqueeze(-2).chunk(2, -1)
        n_BTD = modulated(self.final_norm(x_BTD), shift, scale)
        out_BCHW = unpatched(self.head(scaled(n_BTD, self.multipliers.head)), image)
        loss = None if velocity_BCHW is None else mean_square(out_BCHW, velocity_BCHW)
        return Output(out_BCHW, loss, routings, auxiliary(routings))

    def condition(self, time_B: Tensor, class_B: Tensor) -> Tensor:
        """(B, D): the time's MLP plus the class's row."""
        return self.time_out(F.silu(self.time_in(time_features(time_B)))) + self.class_embedding(class_B)  # type: ignore[no-any-return]

    def end_step_(self, bias_speed: float) -> None:
        """After every optimizer step: what routers change by themselves.

        Args:
            bias_speed: one step of a balance bias.
        """
        for part in self_changing(self):
            part.end_step_(bias_speed)

    def layout(self) -> Sequence[Layout]:
        """Role and axes of every parameter (``mue.layouts.layout``)."""
        matrix = ("out", "in")
        rows = [
            Layout("patch_embedding.weight", "patch_embedding", matrix),
            Layout("time_in.weight", "time_embedding_in", matrix),
            Layout("time_out.weight", "time_embedding_out", matrix),
            Layout("class_embedding.weight", "class_embedding", ("in", "out")),
            Layout("blocks.*.modulation.weight", "modulation", matrix),
        ]
        rows += block_rows(self.shape, self.blocks)
        rows += [
            Layout("final_norm.weight", "final_norm", ("vector",)),
            Layout("final_modulation.weight", "final_modulation", matrix),
        ]
        return [*rows, Layout("head.weight", "head", matrix)]


def patches(x_BCHW: Tensor, image: Image) -> Tensor:
    """(..., C, H, W) as (..., T, P): patches row by row, of each its channels, then its pixels row by row."""
    n, p = image.size // image.patch, image.patch
    x = x_BCHW.reshape(*x_BCHW.shape[:-2], n, p, n, p)  # ..., C, n, p, n, p
    return x.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def unpatched(x_BTP: Tensor, image: Image) -> Tensor:
    """The inverse of :func:`patches`."""
    n, p = image.size // image.patch, image.patch
    x = x_BTP.reshape(*x_BTP.shape[:-2], n, n, image.channels, p, p)
    return x.movedim((-5, -4), (-4, -2)).flatten(-4, -3).flatten(-2)


def time_features(time_B: Tensor) -> Tensor:
    """(..., TIME_FEATURES) cosines and sines of t, in float32 or better (DiT's, 2212.09748, with t in [0, 1])."""
    dtype = torch.promote_types(time_B.dtype, torch.float32)
    half = TIME_FEATURES // 2
    frequency = LONGEST ** -(torch.arange(half, dtype=torch.float64, device=time_B.device) / half)
    angle = time_B.to(dtype)[..., None] * (TIME_SCALE * frequency).to(dtype)
    return torch.cat((angle.cos(), angle.sin()), -1)


def place_table(image: Image, width: int) -> Tensor:
    """(T, width) fixed sines and cosines of a patch's row, then of its column; no parameter."""
    if width % 4:
        raise ValueError(f"width {width} is not divisible by 4: places have sines and cosines of a row and of a column")
    n = image.size // image.patch
    frequency = LONGEST ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
    line = torch.cat((angle.sin(), angle.cos()), -1)
    return torch.cat((line.repeat_interleave(n, 0), line.repeat(n, 1)), -1).float()


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error in fp32 or better over (B, C, H, W): a scalar; of variants one each."""
    dtype = torch.promote_types(found.dtype, torch.float32)
    return (found.to(dtype) - wanted.to(dtype)).square().flatten(-4).mean(-1)
