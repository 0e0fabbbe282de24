"""The order of fused projections, measured on models that cut their rows in known ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mue.layouts.layout import Layout
from mue.layouts.observe.part_order import part_orders

D, HEADS, KV, SIZE = 12, 4, 2, 3
Cut = Callable[[Tensor], list[Tensor]]


def halves(x: Tensor) -> list[Tensor]:
    return list(x.chunk(2, -1))


def every_other(x: Tensor) -> list[Tensor]:
    return [x[..., ::2], x[..., 1::2]]


def blocks(x: Tensor) -> list[Tensor]:
    return list(x.split([HEADS * SIZE, KV * SIZE, KV * SIZE], -1))


def by_head(x: Tensor) -> list[Tensor]:
    parts = x.unflatten(-1, (KV, -1)).split([HEADS // KV * SIZE, SIZE, SIZE], -1)
    return [part.flatten(-2) for part in parts]


def keys_first(x: Tensor) -> list[Tensor]:
    k, q, v = x.split([KV * SIZE, HEADS * SIZE, KV * SIZE], -1)
    return [q, k, v]


class Model(nn.Module):
    """Attention and a gated feed-forward, each with one fused projection and a bias, cut as it is told."""

    def __init__(self, qkv: Cut, gate_up: Cut, gate: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.qkv, self.gate_up = nn.Linear(D, (HEADS + 2 * KV) * SIZE), nn.Linear(D, 2 * D)
        self.o, self.down = nn.Linear(HEADS * SIZE, D), nn.Linear(D, D)
        self.cut_qkv, self.cut_gate_up, self.gate = qkv, gate_up, gate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, SIZE)).mT for part in self.cut_qkv(self.qkv(x)))
        k, v = (part.repeat_interleave(HEADS // KV, -1) for part in (k, v))
        y = F.scaled_dot_product_attention(*(part.permute(0, 3, 1, 2) for part in (q, k, v)))
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        gate, up = self.cut_gate_up(self.gate_up(x))
        return x + self.down(self.gate(gate) * up)


ROWS = {
    "qkv.weight": Layout("qkv.weight", "attention_q", ("out", "in"), ("attention_q", "attention_k", "attention_v")),
    "qkv.bias": Layout("qkv.bias", "bias", ("vector",)),
    "gate_up.weight": Layout("gate_up.weight", "ffn_gate", ("out", "in"), ("ffn_gate", "ffn_up")),
    "gate_up.bias": Layout("gate_up.bias", "bias", ("vector",)),
    "o.weight": Layout("o.weight", "attention_o", ("out", "in")),
}


@pytest.mark.parametrize(
    ("qkv", "gate_up", "gate", "found"),
    [
        (blocks, halves, F.silu, ("blocks", "blocks")),
        (by_head, every_other, F.gelu, ("heads", "rows")),
        (keys_first, halves, torch.sigmoid, ("unknown", "unknown")),  # other cuts; a gate that is open at 0
    ],
)
def test_the_order_is_measured(
    qkv: Cut, gate_up: Cut, gate: Callable[[Tensor], Tensor], found: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    model = Model(qkv, gate_up, gate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    orders = part_orders(model, lambda m: m(torch.randn(2, 5, D)), ROWS, HEADS, KV)
    assert orders == dict(zip(("qkv.weight", "gate_up.weight"), found, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_does_nothing_shows_nothing() -> None:
    """A pass that never reaches the tensors fits every order, and says none."""
    model = Model(blocks, halves)
    for shown in (torch.ones(2, 3), {"loss": torch.ones(()), "logits": (torch.ones(2, 3),)}, None):
        orders = part_orders(model, lambda m, shown=shown: shown, ROWS, HEADS, KV)
        assert set(orders.values()) == {"unknown"}
