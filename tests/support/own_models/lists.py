"""A decoder in nanoGPT's manner: biases everywhere, LayerNorm, a list of expert modules, logits and loss (or the loss alone) returned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import mue


class MLP(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Any:
        return self.proj(gelu(self.fc(x)))


class Block(nn.Module):
    def __init__(self, shape: Any, wrong: Collection[str]) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.active, self.wrong = shape.num_heads, shape.active, wrong
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.router = nn.Linear(d, shape.experts)
        experts = (
            [MLP(d, shape.expert)] * shape.experts
            if "one expert" in wrong
            else [MLP(d, shape.expert) for _ in range(shape.experts)]
        )
        self.experts = nn.ModuleList(experts)

    def attend(self, x: Tensor, scale: float | None) -> Any:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        drop = 0.1 if "attention dropout" in self.wrong and self.training else 0.0
        y = scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=drop, scale=None if "attention scale" in self.wrong else scale
        )
        return self.o(y.transpose(1, 2).flatten(2))

    def mix(self, x: Tensor, route: float) -> Tensor:
        scores = self.router(x).softmax(-1)
        if "softmax over chosen of all" in self.wrong:
            gate, chosen = scores.topk(self.active)
        else:
            gate, chosen = self.router(x).topk(self.active)
            gate = gate.softmax(-1)
        y = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            token, slot = (chosen == n).nonzero(as_tuple=True)
            out = expert(x[token])
            if "bias beside the gate" in self.wrong:
                out = route * gate[token, slot, None] * (out - expert.proj.bias) + expert.proj.bias
            else:
                out = out * gate[token, slot, None] * (1 if "route" in self.wrong else route)
            y = y.index_add(0, token, out)
        return y

    def forward(self, x: Tensor, m: mue.Multipliers, layer: int) -> Tensor:
        x = x + m.residual * self.attend(self.ln1(x), m.attention_scale)
        inner = x if "pre-norm left out" in self.wrong else self.ln2(x)
        return x + m.residual * (m.output[layer]) * self.mix(inner.flatten(0, 1), m.route[layer]).view_as(x)


class Lists(nn.Module):
    """``forward(ids, targets)`` is (logits, loss), or the loss alone where ``only_loss``."""

    def __init__(
        self, shape: Any, multipliers: mue.Multipliers, wrong: Collection[str] = (), only_loss: bool = False
    ) -> None:
        super().__init__()
        self.rows: dict[str, mue.Layout] = {}  # other rows than these, by name
        self.m, self.wrong, self.only_loss = multipliers, wrong, only_loss
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.h = nn.ModuleList(Block(shape, wrong) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocab)
        self.drop = nn.Dropout(0.1 if "dropout" in wrong else 0.0)

    def forward(self, ids: Tensor, targets: Tensor) -> Any:
        x = self.drop(self.wte(ids))
        for layer, block in enumerate(self.h):
            x = block(x, self.m, layer)
        logits = self.lm_head(self.ln_f(x)) * (1 if "head" in self.wrong else self.m.head)
        reduction = "sum" if "sum" in self.wrong else "mean"
        smoothing = 0.1 if "smoothing" in self.wrong else 0.0
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, label_smoothing=smoothing)
        if "accumulation" in self.wrong:
            loss = loss / 8
        return loss if self.only_loss else (logits, loss)

    def layout(self) -> list[mue.Layout]:
        row = mue.Layout
        w = ("out", "in")
        rows = {
            "wte": row("wte.weight", "embedding", ("in", "out")),
            "q": row("h.*.q.weight", "attention_q", w),
            "k": row("h.*.k.weight", "attention_k", w),
            "v": row("h.*.v.weight", "attention_v", w),
            "o": row("h.*.o.weight", "attention_o", w),
            "fc": row("h.*.experts.*.fc.weight", "expert_up", w),
            "proj": row("h.*.experts.*.proj.weight", "expert_down", w),
            "router": row("h.*.router.weight", "router", w),
            "bias router": row("h.*.router.bias", "bias", ("vector",)),
            "bias attention q": row("h.*.q.bias", "bias", ("vector",)),
            "bias attention k": row("h.*.k.bias", "bias", ("vector",)),
            "bias attention v": row("h.*.v.bias", "bias", ("vector",)),
            "bias attention o": row("h.*.o.bias", "bias", ("vector",)),
            "bias fc": row("h.*.experts.*.fc.bias", "bias", ("vector",)),
            "bias proj": row("h.*.experts.*.proj.bias", "bias", ("vector",)),
            "ln": row("h.*.ln*.weight", "norm", ("vector",)),
            "bias ln": row("h.*.ln*.bias", "bias", ("vector",)),
            "ln_f": row("ln_f.weight", "final_norm", ("vector",)),
            "bias ln_f": row("ln_f.bias", "bias", ("vector",)),
            "lm_head": row("lm_head.weight", "head", w),
            "bias lm_head": row("lm_head.bias", "bias", ("vector",)),
        }
        return [*{**rows, **self.rows}.values()]
