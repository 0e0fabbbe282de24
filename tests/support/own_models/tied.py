"""A decoder in GPT-J's manner: attention and feed-forward beside each other, learned positions, a tied head, a dictionary returned.

The first layer is dense, the others have experts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu, scaled_dot_product_attention

import mue


class Routed(nn.Module):
    """Experts stacked in (N, d, h) and (N, h, d), read from the right: the other way round than Linear."""

    def __init__(self, d: int, block: Any, wrong: Collection[str]) -> None:
        super().__init__()
        self.gate = nn.Linear(d, block.experts, bias=False)
        self.active, self.wrong = block.active, wrong
        self.up = nn.Parameter(torch.randn(block.experts, d, block.expert))
        self.down = nn.Parameter(torch.randn(block.experts, block.expert, d))

    def forward(self, x: Tensor, route: float) -> Any:
        weight, chosen = self.gate(x).softmax(-1).topk(self.active)
        weight = route * weight / weight.sum(-1, keepdim=True)
        full = torch.zeros(*x.shape[:-1], len(self.up), dtype=x.dtype).scatter(-1, chosen, weight)
        hidden = torch.einsum("bsd,ndh->bsnh", x, self.up)
        if "route squared" in self.wrong:
            full = full * route
        return torch.einsum("bsnh,nhd,bsn->bsd", relu(hidden), self.down, full)


class Dense(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor, route: float) -> Any:
        return self.down(relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, shape: Any, block: mue.Block, wrong: Collection[str]) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.wrong = shape.num_heads, wrong
        self.norm = nn.LayerNorm(d, bias=False)
        self.kv, self.q, self.o = (
            nn.Linear(d, 2 * d, bias=False),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d, bias=False),
        )
        self.mlp = Routed(d, block, wrong) if block.experts else Dense(d, block.ffn)

    def attend(self, x: Tensor, scale: float | None) -> Any:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        scale = scale**2 if "attention scale twice" in self.wrong else scale
        return self.o(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, m: mue.Multipliers, layer: int) -> Tensor:
        y = self.norm(x)
        a, f = self.attend(y, m.attention_scale), self.mlp(y, m.route[layer])
        output = m.output[layer]
        if "A of the first layer" in self.wrong:
            output = m.output[0]
        if "A on attention too" in self.wrong:
            return x + m.residual * output * (a + f)
        if "halved sum" in self.wrong:
            return x + m.residual * (a + output * f) / 2
        if "residual on stream" in self.wrong:
            return m.residual * (x + a + output * f)
        return x + m.residual * (a + output * f)


class Tied(nn.Module):
    """A dictionary of logits and, where ``labels`` are given, loss."""

    def __init__(self, shape: Any, multipliers: mue.Multipliers, wrong: Collection[str] = ()) -> None:
        super().__init__()
        self.rows: dict[str, mue.Layout] = {}  # other rows than these, by name
        self.m, self.wrong = multipliers, wrong
        self.wte, self.wpe = nn.Embedding(shape.vocab, shape.width), nn.Embedding(shape.sequence, shape.width)
        blocks = [b for b in shape.blocks for _ in range(b.layers)]
        self.layers = nn.ModuleList(Block(shape, b, wrong) for b in blocks)
        self.final = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if "untied" not in wrong:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.wte(ids)
        if "no positions" not in self.wrong:
            x = x + self.wpe.weight[: ids.shape[1]] * (
                x.shape[-1] ** 0.5 if "positions times root" in self.wrong else 1
            )
        for layer, block in enumerate(self.layers):
            x = block(x, self.m, layer)
        logits = linear(self.final(x), self.head.weight)
        if "head" not in self.wrong:
            logits = logits * self.m.head
        if "logits over root" in self.wrong:
            logits = logits / x.shape[-1] ** 0.5
        if labels is None:
            return {"logits": logits}
        if "unshifted" in self.wrong:
            return {"logits": logits, "loss": cross_entropy(logits.mT, labels)}
        return {"logits": logits, "loss": cross_entropy(logits[:, :-1].mT, labels[:, 1:])}

    def layout(self) -> list[mue.Layout]:
        row = mue.Layout
        w = ("out", "in")
        rows = {
            "wte": row("wte.weight", "embedding", ("in", "out")),
            "wpe": row("wpe.weight", "position", ("in", "out")),
            "q": row("layers.*.q.weight", "attention_q", w),
            "kv": row("layers.*.kv.weight", "attention_k", w, parts=("attention_k", "attention_v")),
            "o": row("layers.*.o.weight", "attention_o", w),
            "dense up": row("layers.0.mlp.up.weight", "ffn_up", w),
            "dense down": row("layers.0.mlp.down.weight", "ffn_down", w),
            "up": row("layers.*.mlp.up", "expert_up", ("expert", "in", "out")),
            "down": row("layers.*.mlp.down", "expert_down", ("expert", "in", "out")),
            "gate": row("layers.*.mlp.gate.weight", "router", w),
            "norm": row("layers.*.norm.weight", "norm", ("vector",)),
            "final": row("final.weight", "final_norm", ("vector",)),
        }
        if "untied row" in self.wrong:
            rows["head"] = row("head.weight", "head", w)
        return [*{**rows, **self.rows}.values()]
