"""The language model of the lab: a decoder with RMSNorm, RoPE, QK-norm and SwiGLU, each block dense or with experts.

It is built from a shape (numbers) and the forward multipliers of a plan; with the default multipliers it is a stock
model. No biases, no dropout. Its layers are in ``mue.lab.models.layers``; which way each sublayer is computed is decided in
``mue.lab.models.residual``.

Shape suffixes: B sequences, T tokens of a sequence, D width, V vocabulary. Stacked variants are a leading axis of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.lab.models.layers import Attention, Embedding, FeedForward, Linear, PastTokens, RMSNorm
from mue.lab.models.ops import scaled
from mue.lab.models.output import Output
from mue.lab.models.residual import add_attention, add_experts, add_feed_forward
from mue.layouts.layout import Layout
from mue.moe import ExpertPool, MoELayer, Routing
from mue.moe.layer import self_changing
from mue.moe.losses import consistency_loss
from mue.moe.routers.base import Balance, BaseRouter, RouterInput, RouterOptions, share
from mue.plan.values import Multipliers
from mue.shapes import Block, Transformer


class TransformerBlock(nn.Module):
    """x + l^-α · attention(norm x), then x + l^-α · feed-forward(norm x), dense or with experts.

    Args:
        shape: of the whole model. block, layer: what this one is, and the how many-th.
        multipliers: the plan's: l^-α, and of this layer A on the feed-forward and R on its routed sum
            (:class:`mue.plan.values.Multipliers` has the formula).
        options: what the run says to the router.
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
        A = multipliers.output[layer] if multipliers.output else 1.0
        R = multipliers.route[layer] if multipliers.route else 1.0
        self.residual = multipliers.residual
        self.attention_norm = RMSNorm(shape.width)
        self.attention = Attention(shape, multipliers.attention_scale)
        self.ffn_norm = RMSNorm(shape.width)
        self.ffn: FeedForward | None = None
        self.moe: MoELayer | None = None
        if block.ffn is not None:
            self.ffn = FeedForward(shape.width, block.ffn, shape.gated, A)
        else:
            options = replace(options, route_scale=R, layer=layer)
            self.moe = MoELayer.from_block(
                block, shape.width, options, output_multiplier=A, gated=shape.gated, pool=pool
            )

    def forward(
        self, x_BTD: Tensor, given: RouterInput | None = None, past: PastTokens | None = None
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = add_attention(x_BTD, self.attention_norm, self.attention, self.residual, past)
        if self.moe is not None:
            return add_experts(x_BTD, self.ffn_norm, self.moe, self.residual, given)
        assert self.ffn is not None
        return add_feed_forward(x_BTD, self.ffn_norm, self.ffn, self.residual), None


class LanguageModel(nn.Module):
    """A causal language model of ``shape`` with the forward ``multipliers`` of a plan (default: a stock model).

    Args:
        shape: width, blocks, heads, vocabulary, longest sequence, tied or not.
        multipliers: ``plan.multipliers``.
        balance: how experts are balanced: ``"bias"`` (aux-loss-free), ``"loss"`` or ``"none"``.
        z_loss: also compute the router z-loss.
        consistency: train with two passes over every batch and their :func:`mue.moe.losses.consistency_loss` (THOR).
        seed: of routers that draw, or that are drawn once.

    Raises:
        ValueError: an odd head size; multipliers for another number of layers; consistency without a router that draws.
    """

    def __init__(
        self,
        shape: Transformer,
        multipliers: Multipliers | None = None,
        *,
        balance: Balance = "bias",
        z_loss: bool = False,
        consistency: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        ones = (1.0,) * shape.layers
        multipliers = multipliers or Multipliers(output=ones, route=ones)
        for name in ("output", "route"):
            given = getattr(multipliers, name)
            if len(given) != shape.layers:
                raise ValueError(f"multipliers.{name} has {len(given)} entries, the shape {shape.layers} layers")
        routers = [block.router_kind for block in shape.blocks if block.experts]
        if consistency and not any(kind.stochastic for kind in routers):
            raise ValueError(f"consistency compares two draws of the experts, and no router of {shape.name} draws any")
        self.shape, self.multipliers, self.consistency = shape, multipliers, consistency
        self.reads_input = consistency or any(kind.needs_tokens for kind in routers)
        options = RouterOptions(balance=balance, z_loss=z_loss, seed=seed)
        self.embedding = Embedding(shape.vocab, shape.width)
        pools = self._pools(shape)
        self.blocks = nn.ModuleList(
            TransformerBlock(shape, block, multipliers, layer, replace(options, pool=i), pool)
            for layer, (block, (i, pool)) in enumerate(zip(shape.per_layer, pools, strict=True))
        )
        if (
            common := share([module for module in self.blocks.modules() if isinstance(module, BaseRouter)])
        ) is not None:
            self.common = common  # only where there is one: the state dict of other models stays as it is
        self.final_norm = RMSNorm(shape.width)
        self.head = Linear(shape.width, shape.vocab)
        if shape.tied:
            # one Parameter, so that named_parameters has it once and its gradient is the sum of both uses
            self.head.weight = self.embedding.weight

    def _pools(self, shape: Transformer) -> list[tuple[int, ExpertPool | None]]:
        """Of every layer, which pool of experts it reads, and the pool. The model holds pools where there are any."""
        found: list[tuple[int, ExpertPool | None]] = [(0, None)] * shape.layers
        made = nn.ModuleList()
        for i, layers in enumerate(shape.pool_layers):
            block = shape.per_layer[layers[0]]
            pool = ExpertPool(shape.width, block.experts, block.expert or 0, gated=shape.gated)
            made.append(pool)
            found[layers[0] : layers[-1] + 1] = [(i, pool)] * len(layers)
        if made:
            self.pools = made
        return found

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, past: Sequence[PastTokens] | None = None
    ) -> Output:
        """Logits, and the mean cross-entropy in nats where targets are given.

        Args:
            targets_BT: of the last positions: of all T, or of fewer; logits are then computed for those alone.
            past: what each layer has seen before these tokens (:meth:`no_past`); it is continued by them.

        Raises:
            ValueError: sequences longer than the shape's.
        """
        length = tokens_BT.shape[-1] + (len(past[0]) if past else 0)
        if length > self.shape.sequence:
            raise ValueError(f"sequence of {length} tokens, the model was built for {self.shape.sequence}")
        first = self._pass(tokens_BT, targets_BT, 0, past)
        if not (self.consistency and self.training and targets_BT is not None):
            return first
        second = self._pass(tokens_BT, targets_BT, 1)
        assert first.loss is not None and second.loss is not None
        # Half the objective of 2110.04260, CE1 + CE2 + α·consistency, so that the loss is still one batch's.
        losses = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
        losses["consistency"] = consistency_loss(first.logits, second.logits) / 2
        return Output(first.logits, (first.loss + second.loss) / 2, first.routings, losses)

    def no_past(self) -> list[PastTokens]:
        """For :meth:`forward` token by token: each layer's memory, empty."""
        return [PastTokens() for _ in self.blocks]

    def _pass(
        self, tokens_BT: Tensor, targets_BT: Tensor | None, draw: int, past: Sequence[PastTokens] | None = None
    ) -> Output:
        """One pass; ``draw`` tells routers that draw which of two over the same batch it is."""
        given = RouterInput(tokens_BT, draw) if self.reads_input else None
        x_BTD = self.embedding(tokens_BT)
        routings = []
        for i, block in enumerate(self.blocks):
            # a block of somebody's own need know of neither
            also = {k: v for k, v in (("given", given), ("past", past and past[i])) if v is not None}
            x_BTD, routing = block(x_BTD, **also)
            if routing is not None and routing.num_experts:
                routings.append(routing)
        if targets_BT is not None:
            x_BTD = x_BTD[..., -targets_BT.shape[-1] :, :]
        # On the hidden state rather than on the logits: the same product, V/D times fewer elements.
        logits_BTV = self.head(scaled(self.final_norm(x_BTD), self.multipliers.head))
        loss = None if targets_BT is None else mean_loss(logits_BTV, targets_BT)
        names = dict.fromkeys(name for routing in routings for name in routing.losses)
        losses = {n: torch.stack([r.losses[n] for r in routings if n in r.losses]).sum(0) for n in names}
        return Output(logits_BTV, loss, routings, losses)

    def end_step_(self, bias_speed: float) -> None:
        """After every optimizer step: what routers change by themselves.

        Args:
            bias_speed: one step of a balance bias, for scores that begin at ½ (smaller ones get a smaller step).
        """
        for part in self_changing(self):
            part.end_step_(bias_speed)

    def layout(self) -> Sequence[Layout]:
        """Role and axes of every parameter (``mue.layouts.layout``)."""
        blocks, gated = self.shape.blocks, self.shape.gated
        parts = ("up", "gate", "down") if gated else ("up", "down")
        rows = [Layout("embedding.weight", "embedding", ("in", "out"))]
        rows += [Layout(f"blocks.*.attention.{x}.weight", f"attention_{x}", ("out", "in")) for x in "qkvo"]
        rows += [Layout(f"blocks.*.attention.{x}_norm.weight", "qk_norm", ("vector",)) for x in "qk"]
        rows += [Layout(f"blocks.*.{x}_norm.weight", "norm", ("vector",)) for x in ("attention", "ffn")]
        if any(not block.is_moe for block in blocks):
            rows += [Layout(f"blocks.*.ffn.{part}.weight", f"ffn_{part}", ("out", "in")) for part in parts]
        rows += dict.fromkeys(row for block in self.blocks for row in _router_rows(block))
        if any(block.experts and not block.pools for block in blocks):
            rows += [Layout(f"blocks.*.moe.experts_{p}", f"expert_{p}", ("expert", "out", "in")) for p in parts]
        for i, layers in enumerate(self.shape.pool_layers):
            rows += [Layout(f"pools.{i}.{p}", f"expert_{p}", ("expert", "out", "in"), layers=layers) for p in parts]
        if any(block.shared_experts for block in blocks):
            rows += [Layout(f"blocks.*.moe.shared_{p}", f"shared_{p}", ("out", "in")) for p in parts]
        rows += [Layout("final_norm.weight", "final_norm", ("vector",))]
        return [*rows, Layout("head.weight", "head", ("out", "in"))]


def _router_rows(block: nn.Module) -> list[Layout]:
    """What the router of a block says of its parameters, by their names in the model."""
    router = block.moe.router if isinstance(block, TransformerBlock) and block.moe is not None else None
    return (
        []
        if router is None
        else [replace(row, pattern=f"blocks.*.moe.router.{row.pattern}") for row in router.layout()]
    )


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats, fp32 or better: a scalar; of variants one each."""
    logits = logits_BTV.flatten(0, -2)
    each = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_BT.flatten(), reduction="none"
    )
    return each.view(*targets_BT.shape[:-2], -1).mean(-1)
