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

from mue.lab.models.layers import Attention, Embedding, Linear, PastTokens, RMSNorm
from mue.lab.models.ops import scaled
from mue.lab.models.output import Output
from mue.lab.models.parts import auxiliary, block_rows, checked_multipliers, feed_forward_of, pools_of, routers_in
from mue.lab.models.residual import add_attention, add_experts, add_feed_forward
from mue.layouts.layout import Layout
from mue.moe import ExpertPool, Routing
from mue.moe.layer import self_changing
from mue.moe.losses import consistency_loss
from mue.moe.routers.base import Balance, RouterInput, RouterOptions, share
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
        self.residual = multipliers.residual
        self.attention_norm = RMSNorm(shape.width)
        self.attention = Attention(shape, multipliers.attention_scale)
        self.ffn_norm = RMSNorm(shape.width)
        self.ffn, self.moe = feed_forward_of(shape, block, multipliers, layer, options, pool)

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
        multipliers = checked_multipliers(shape, multipliers)
        routers = [block.router_kind for block in shape.blocks if block.experts]
        if consistency and not any(kind.stochastic for kind in routers):
            raise ValueError(f"consistency compares two draws of the experts, and no router of {shape.name} draws any")
        self.shape, self.multipliers, self.consistency = shape, multipliers, consistency
        self.reads_input = consistency or any(kind.needs_tokens for kind in routers)
        options = RouterOptions(balance=balance, z_loss=z_loss, seed=seed)
        self.embedding = Embedding(shape.vocab, shape.width)
        pools, made = pools_of(shape)
        if made:
            self.pools = made
        self.blocks = nn.ModuleList(
            TransformerBlock(shape, block, multipliers, layer, replace(options, pool=i), pool)
            for layer, (block, (i, pool)) in enumerate(zip(shape.per_layer, pools, strict=True))
        )
        if (common := share(routers_in(self.blocks))) is not None:
            self.common = common  # only where there is one: the state dict of other models stays as it is
        self.final_norm = RMSNorm(shape.width)
        self.head = Linear(shape.width, shape.vocab)
        if shape.tied:
            # one Parameter, so that named_parameters has it once and its gradient is the sum of both uses
            self.head.weight = self.embedding.weight

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
        return Output(logits_BTV, loss, routings, auxiliary(routings))

    def end_step_(self, bias_speed: float) -> None:
        """After every optimizer step: what routers change by themselves.

        Args:
            bias_speed: one step of a balance bias, for scores that begin at ½ (smaller ones get a smaller step).
        """
        for part in self_changing(self):
            part.end_step_(bias_speed)

    def layout(self) -> Sequence[Layout]:
        """Role and axes of every parameter (``mue.layouts.layout``)."""
        rows = [Layout("embedding.weight", "embedding", ("in", "out"))]
        rows += block_rows(self.shape, self.blocks)
        rows += [Layout("final_norm.weight", "final_norm", ("vector",))]
        return [*rows, Layout("head.weight", "head", ("out", "in"))]


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats, fp32 or better: a scalar; of variants one each."""
    logits = logits_BTV.flatten(0, -2)
    each = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_BT.flatten(), reduction="none"
    )
    return each.view(*targets_BT.shape[:-2], -1).mean(-1)
