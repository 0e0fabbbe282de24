"""The language model of the lab: a decoder with RMSNorm, RoPE, QK-norm and SwiGLU, each block dense or with experts.

It is built from a shape (numbers) and the forward multipliers of a plan; with the default multipliers it is a stock
model. No biases, no dropout.

Every product broadcasts over a leading axis of variants: with weights (variants, out, in) and tokens (variants, B, T) one call
computes as many models at once (``mue.lab.train.stacked_session``); without that axis it is an ordinary model.

Shape suffixes: B sequences, T tokens of a sequence, D width, H heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.kernels import norm, sublayer
from mue.lab.models.ops import (
    attend,
    attention_by_kernel,
    feed_forward,
    feed_forward_by_kernel,
    is_half,
    one_multiplier,
    project,
)
from mue.lab.models.output import Output
from mue.layouts.layout import Layout
from mue.moe import MoELayer, Routing
from mue.moe.losses import consistency_loss
from mue.moe.routers.base import Balance, RouterInput, RouterOptions
from mue.plan.values import Multipliers
from mue.shapes import Block, Transformer

EPS = 1e-6  # of every norm


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last axis; with a ``turn`` then RoPE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        gain, width = self.weight, self.weight.shape[-1:]
        if gain.dim() == 1:
            if (fused := norm.rms_norm(x, gain, EPS, turn)) is not None:
                return fused
            y = F.rms_norm(x.to(torch.promote_types(x.dtype, gain.dtype)), width, gain, EPS)
        else:
            y = (F.rms_norm(x, width, None, EPS) * gain.view(-1, *(1,) * (x.dim() - 2), *width)).to(x.dtype)
        return y if turn is None else rotate(y, turn)


class Linear(nn.Linear):
    """x · weightᵀ without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight)


class Embedding(nn.Embedding):
    """Rows of the table; of variants each from its own."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.embedding(input, self.weight)
        variants, vocab, _ = self.weight.shape
        first = torch.arange(0, variants * vocab, vocab, device=input.device)
        return F.embedding(input + first.view(-1, *(1,) * (input.dim() - 1)), self.weight.flatten(0, 1))


class Attention(nn.Module):
    """Causal attention with QK-norm and RoPE; the logits are multiplied by ``scale`` (None: 1/√E)."""

    turn: Tensor

    def __init__(self, shape: Transformer, scale: float | None) -> None:
        super().__init__()
        E, D = shape.head_dim, shape.width
        if E % 2:
            raise ValueError(f"head_dim {E} is odd: rotary positions need pairs, choose an even head_dim")
        self.head_dim, heads, kv_heads = E, shape.num_heads, shape.num_kv_heads
        self.scale = E**-0.5 if scale is None else scale
        self.q = Linear(D, heads * E)
        self.k = Linear(D, kv_heads * E)
        self.v = Linear(D, kv_heads * E)
        self.o = Linear(heads * E, D)
        self.q_norm, self.k_norm = RMSNorm(E), RMSNorm(E)
        self.register_buffer("turn", rotary_table(shape.sequence, E), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        turn = self.turn[: x_BTD.shape[-2]]
        heads = *x_BTD.shape[:-1], -1, self.head_dim
        q_BTHE, k_BTKE, v_BTKE = (p(x_BTD).view(heads) for p in (self.q, self.k, self.v))
        q_BTHE, k_BTKE = self.q_norm(q_BTHE, turn), self.k_norm(k_BTKE, turn)
        # Variants are more sequences here: attention has no weights.
        q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        y = attend(q, k, v, self.scale)
        return self.o(y.transpose(1, 2).reshape(*x_BTD.shape[:-1], -1))  # type: ignore[no-any-return]


def rotary_table(length: int, head_dim: int, base: float = 10_000.0) -> Tensor:
    """cos and sin of RoPE (2104.09864) as (length, 1, head_dim/2, 2)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), -1).float()[:, None]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of the last axis of (B, T, H, E): one complex product; fp32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, turn.dtype), torch.float32)  # no complex bf16 in torch
    if torch.compiler.is_compiling():  # the same in reals: the compiler makes no kernels for complex numbers
        (a, b), (cos, sin) = x.to(dtype).view(*x.shape[:-1], -1, 2).unbind(-1), turn.to(dtype).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.to(dtype).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(turn.to(dtype))).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """A · down(silu(gate x) · up x), or A · down(gelu(up x)) where not gated."""

    def __init__(self, width: int, hidden: int, gated: bool, output_multiplier: float) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.gate = Linear(width, hidden) if gated else None
        self.down = Linear(hidden, width)
        self.output_multiplier = output_multiplier

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate.weight
        return scaled(feed_forward(x, gate, self.up.weight, self.down.weight), self.output_multiplier)


_OWN = frozenset({RMSNorm, Linear, Attention, FeedForward, MoELayer})


def untouched(*modules: nn.Module) -> bool:
    """Whether modules are as they were made: none replaced or patched, none with a hook that wants to be called."""
    for module in modules:
        if (
            type(module) not in _OWN
            or "forward" in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
        ):
            return False
        if module._backward_hooks or module._backward_pre_hooks:
            return False
    return True


class TransformerBlock(nn.Module):
    """x + l^-α·attention(norm x), then x + l^-α·feed-forward(norm x).

    In training each is one call of the native kernel where that is faster and the modules in it are untouched.
    """

    def __init__(
        self, shape: Transformer, block: Block, multipliers: Multipliers, layer: int, options: RouterOptions
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
            self.moe = MoELayer.from_block(block, shape.width, options, output_multiplier=A, gated=shape.gated)

    def forward(self, x_BTD: Tensor, given: RouterInput | None = None) -> tuple[Tensor, Routing | None]:
        x_BTD = self._attend(x_BTD)
        if self.moe is None:
            return self._feed_forward(x_BTD), None
        also = {} if given is None else {"given": given}
        if untouched(self.moe) and one_multiplier(x_BTD):
            y, routing = self.moe(self.ffn_norm(x_BTD), self.residual, **also)
            return x_BTD + y, routing
        y, routing = self.moe(self.ffn_norm(x_BTD), **also)
        return torch.add(x_BTD, y, alpha=self.residual), routing

    def _attend(self, x_BTD: Tensor) -> Tensor:
        own, turn = self.attention, self.attention.turn[: x_BTD.shape[-2]]
        parts = self.attention_norm, own.q, own.k, own.v, own.q_norm, own.k_norm, own.o
        if untouched(own, *parts) and attention_by_kernel(x_BTD, weights := [m.weight for m in parts]):
            c, half = self.residual, is_half(x_BTD)
            return sublayer.attention(x_BTD, weights, turn, scale=own.scale, residual=c, eps=EPS, half=half)
        return torch.add(x_BTD, own(self.attention_norm(x_BTD)), alpha=self.residual)

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        own = self.ffn
        assert own is not None
        weights = self.ffn_norm.weight, None if own.gate is None else own.gate.weight, own.up.weight, own.down.weight
        if untouched(self.ffn_norm, own) and feed_forward_by_kernel(x_BTD, weights):
            c = self.residual * own.output_multiplier
            return sublayer.feed_forward(x_BTD, weights, residual=c, eps=EPS, half=is_half(x_BTD))
        return torch.add(x_BTD, own(self.ffn_norm(x_BTD)), alpha=self.residual)


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
        self.blocks = nn.ModuleList(
            TransformerBlock(shape, block, multipliers, layer, options) for layer, block in enumerate(shape.per_layer)
        )
        self.final_norm = RMSNorm(shape.width)
        self.head = Linear(shape.width, shape.vocab)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Output:
        """Logits, and the mean cross-entropy in nats where targets are given.

        Args:
            targets_BT: of the last positions: of all T, or of fewer; logits are then computed for those alone.

        Raises:
            ValueError: sequences longer than the shape's.
        """
        if tokens_BT.shape[-1] > self.shape.sequence:
            raise ValueError(f"sequence of {tokens_BT.shape[-1]} tokens, the model was built for {self.shape.sequence}")
        first = self._pass(tokens_BT, targets_BT, 0)
        if not (self.consistency and self.training and targets_BT is not None):
            return first
        second = self._pass(tokens_BT, targets_BT, 1)
        assert first.loss is not None and second.loss is not None
        # Half the objective of 2110.04260, CE1 + CE2 + α·consistency, so that the loss is still one batch's.
        losses = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
        losses["consistency"] = consistency_loss(first.logits, second.logits) / 2
        return Output(first.logits, (first.loss + second.loss) / 2, first.routings, losses)

    def _pass(self, tokens_BT: Tensor, targets_BT: Tensor | None, draw: int) -> Output:
        given = RouterInput(tokens_BT, draw) if self.reads_input else None
        x_BTD = self.embedding(tokens_BT)
        routings = []
        for block in self.blocks:
            x_BTD, routing = block(x_BTD) if given is None else block(x_BTD, given)
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
        """After every optimizer step: what routers change by themselves (a balance bias by ``bias_speed``, what is drawn next)."""
        for block in self.blocks:
            if isinstance(block, TransformerBlock) and block.moe is not None:
                block.moe.end_step_(bias_speed)

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
        if any(block.experts and block.router_kind.matrix for block in blocks):
            rows += [Layout("blocks.*.moe.router.weight", "router", ("out", "in"))]
        if any(block.experts for block in blocks):
            rows += [Layout(f"blocks.*.moe.experts_{p}", f"expert_{p}", ("expert", "out", "in")) for p in parts]
        if any(block.shared_experts for block in blocks):
            rows += [Layout(f"blocks.*.moe.shared_{p}", f"shared_{p}", ("out", "in")) for p in parts]
        rows += [Layout("final_norm.weight", "final_norm", ("vector",))]
        return [*rows, Layout("head.weight", "head", ("out", "in"))]


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats, fp32 or better: a scalar; of variants one each."""
    logits = logits_BTV.flatten(0, -2)
    each = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_BT.flatten(), reduction="none"
    )
    return each.view(*targets_BT.shape[:-2], -1).mean(-1)


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """x · multiplier, free where it is 1."""
    return x if multiplier == 1.0 else x * multiplier
