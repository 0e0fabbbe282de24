"""A decoder as in many training scripts: fused qkv, rotary positions, RMSNorm, all experts of a layer in two 3-D tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

import mue


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of ``x`` (batch, heads, tokens, head size)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 1000 ** (torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Experts(nn.Module):
    """``w13`` (N, 2h, d) is gate above up, ``w2`` is (N, d, h); ``shared`` a SwiGLU that every token passes."""

    def __init__(self, shape: Any, wrong: Collection[str]) -> None:
        super().__init__()
        d, h, s = shape.width, shape.expert, shape.shared or shape.expert
        experts, self.active = shape.experts * (2 if "experts" in wrong else 1), shape.active + ("active" in wrong)
        s *= 2 if "wide shared" in wrong else 1
        self.kind, self.wrong = shape.router, wrong
        self.router = nn.Linear(d, experts, bias=False)
        self.register_buffer("balance", torch.zeros(experts))
        self.w13, self.w2 = nn.Parameter(torch.randn(experts, 2 * h, d)), nn.Parameter(torch.randn(experts, d, h))
        self.shared13, self.shared2 = nn.Linear(d, 2 * s, bias=False), nn.Linear(s, d, bias=False)

    def gates(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(raw if "router reads stream" in self.wrong else x)
        if "router detached" in self.wrong:
            logits = logits.detach()
        if "temperature" in self.wrong:
            logits = logits / x.shape[-1] ** 0.5
        soft = (self.kind == "softmax") != ("other scores" in self.wrong)
        scores = logits.softmax(-1) if soft else logits.sigmoid()
        chosen = (scores + self.balance).topk(self.active).indices
        gate = scores.gather(-1, chosen)
        if "no renormalisation" not in self.wrong:
            gate = gate / gate.sum(-1, keepdim=True)
        return gate.flip(-1) if "gates in another order" in self.wrong else gate, chosen

    def forward(self, x: Tensor, route: float, raw: Tensor) -> Tensor:
        gate, chosen = self.gates(x, raw)
        a, b = torch.einsum("bsd,nhd->bsnh", x, self.w13).chunk(2, -1)
        if "gate and up" in self.wrong:
            a, b = b, a
        out = torch.einsum("bsnh,ndh->bsnd", silu(a) * b, self.w2)
        gate = gate if "route" in self.wrong else gate * route
        routed = (gate[..., None] * out.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))).sum(2)
        a, b = self.shared13(x).chunk(2, -1)
        if "shared gate and up" in self.wrong:
            a, b = b, a
        shared = self.shared2(silu(a) * b)
        if "no shared" in self.wrong:
            return routed
        return routed + shared * (route if "route on shared" in self.wrong else 1)


class Block(nn.Module):
    def __init__(self, shape: Any, wrong: Collection[str]) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.wrong = shape.num_heads // (2 if "heads" in wrong else 1), wrong
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.moe = Experts(shape, wrong)

    def forward(self, x: Tensor, m: mue.Multipliers, layer: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        scale = None if "attention scale" in self.wrong else m.attention_scale
        causal = "no mask" not in self.wrong
        y = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=causal, scale=scale)
        x = x + m.residual * self.o(y.transpose(1, 2).flatten(2))
        residual = 1 if "residual on attention only" in self.wrong else m.residual
        output = 1 if "no A" in self.wrong else m.output[layer]
        return x + residual * output * self.moe(self.norm2(x), m.route[layer], x)


class Fused(nn.Module):
    """Logits out of token ids. ``multipliers`` are the plan's."""

    def __init__(self, shape: Any, multipliers: mue.Multipliers, wrong: Collection[str] = ()) -> None:
        super().__init__()
        self.rows: dict[str, mue.Layout] = {}  # other rows than these, by name
        self.m, self.wrong = multipliers, wrong
        self.tok = nn.Embedding(shape.vocab, shape.width)
        layers = shape.layers + ("layers" in wrong)
        blocks = (
            [Block(shape, wrong)] * layers if "one block" in wrong else [Block(shape, wrong) for _ in range(layers)]
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(shape.width)
        self.out = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        if "embedding times root" in self.wrong:
            x = x * x.shape[-1] ** 0.5
        for layer, block in enumerate(self.blocks):
            x = block(x, self.m, layer)
        x = x if "no final norm" in self.wrong else self.norm(x)
        return linear(x, self.out.weight) * (1 if "head" in self.wrong else self.m.head)

    def layout(self) -> list[mue.Layout]:
        row = mue.Layout
        rows = {
            "tok": row("tok.weight", "embedding", ("in", "out")),
            "qkv": row(
                "blocks.*.qkv.weight", "attention_q", ("out", "in"), parts=("attention_q", "attention_k", "attention_v")
            ),
            "o": row("blocks.*.o.weight", "attention_o", ("out", "in")),
            "w13": row("blocks.*.moe.w13", "expert_gate", ("expert", "out", "in"), parts=("expert_gate", "expert_up")),
            "w2": row("blocks.*.moe.w2", "expert_down", ("expert", "out", "in")),
            "shared13": row(
                "blocks.*.moe.shared13.weight", "shared_gate", ("out", "in"), parts=("shared_gate", "shared_up")
            ),
            "shared2": row("blocks.*.moe.shared2.weight", "shared_down", ("out", "in")),
            "router": row("blocks.*.moe.router.weight", "router", ("out", "in")),
            "norms": row("blocks.*.norm*.weight", "norm", ("vector",)),
            "norm": row("norm.weight", "final_norm", ("vector",)),
            "out": row("out.weight", "head", ("out", "in")),
        }
        return [*{**rows, **self.rows}.values()]
