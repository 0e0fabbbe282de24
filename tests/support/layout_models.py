"""Models of no library, for the tests of layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.layouts.layout import Layout


@dataclass
class Config:
    """As small a config as a family can have."""

    hidden_size: int = 32
    vocab_size: int = 48
    intermediate_size: int = 40
    num_experts: int = 6
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    head_dim: int = 8


class Strange(nn.Module):
    """A MoE nobody has seen: square shapes, transposed experts, unusual names where shapes suffice."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.table = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(StrangeBlock(c) for _ in range(c.num_hidden_layers))
        self.last_norm = nn.LayerNorm(c.hidden_size)
        self.predict = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.predict(self.last_norm(x))  # type: ignore[no-any-return]


class StrangeBlock(nn.Module):
    """Attention by odd names, and experts (E, d, h) that every token passes through."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        inner = c.num_attention_heads * c.head_dim
        self.norm = nn.LayerNorm(c.hidden_size)
        self.attention = nn.ModuleDict(
            {n: nn.Linear(c.hidden_size, inner, bias=False) for n in ("query", "key", "value")}
        )
        self.attention["output"] = nn.Linear(inner, c.hidden_size, bias=False)
        self.moe = nn.Module()
        self.moe.chooser = nn.Parameter(torch.randn(c.num_experts, c.hidden_size))
        self.moe.up_stack = nn.Parameter(torch.randn(c.num_experts, c.hidden_size, c.intermediate_size))
        self.moe.back = nn.Parameter(torch.randn(c.num_experts, c.intermediate_size, c.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (self.attention[n](y) for n in ("query", "key", "value"))
        x = x + self.attention["output"](F.scaled_dot_product_attention(q, k, v, is_causal=True))
        gate = F.linear(x, self.moe.chooser).softmax(-1)
        h = torch.einsum("btd,edh->bteh", x, self.moe.up_stack).relu()
        return x + torch.einsum("bteh,ehd,bte->btd", h, self.moe.back, gate)


UP = Layout("layers.*.moe.up_stack", "expert_up", ("expert", "in", "out"))
