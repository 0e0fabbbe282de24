"""One tiny MoE as users write theirs (fused or listed experts, biases, a gate on the shared ones), with a plan's multipliers, right or wrong.

Shape suffixes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mue

D, V, T, N, A, H, E = 32, 64, 16, 8, 2, 24, 8
BASE = mue.Dense(width=16, ffn=16, layers=1, head_dim=E, sequence=T, vocab=V)
TARGET = mue.MoE.parse("8e2a1s", width=D, expert=H, layers=2, head_dim=E, sequence=T, vocab=V, router="softmax")
PARTS = {"w1": "expert_gate", "w3": "expert_up", "w2": "expert_down"}


class MoEStructure(nn.Module):
    """A MoE whose ``forward`` returns its loss alone.

    Args:
        multipliers: the plan's.
        options: of "parallel" (both branches in one sum), "ends" (a norm ends each), "lists" (experts are modules), "bias" (in those
            and in attention), "before" (the gate meets the hidden units) and "shared gate" (as Qwen2-MoE has it).
        wrong: by what one of "R", "A", "shared", "residual", "head" or "scale" is multiplied that should not be.
    """

    def __init__(self, multipliers: Any, options: Sequence[str] = (), wrong: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.m, self.options, self.wrong = multipliers, frozenset(options), wrong or {}
        bias = "bias" in self.options
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for b in self.blocks:
            b.qkv, b.o = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
            b.norm1, b.norm2, b.router = nn.RMSNorm(D), nn.RMSNorm(D), nn.Linear(D, N, bias=False)
            if "lists" in self.options:
                b.experts = nn.ModuleList(nn.Module() for _ in range(N))
                for e in b.experts:
                    e.w1, e.w3, e.w2 = (nn.Linear(*s, bias=bias) for s in ((D, H), (D, H), (H, D)))
            else:
                b.w13, b.w2 = nn.Parameter(torch.zeros(N, D, 2 * H)), nn.Parameter(torch.zeros(N, H, D))
            b.up, b.gate, b.down = (nn.Linear(*s, bias=False) for s in ((D, H), (D, H), (H, D)))
            if "shared gate" in self.options:
                b.shared_gate = nn.Linear(D, 1, bias=False)
            if "ends" in self.options:
                b.end1, b.end2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.norm, self.head = nn.RMSNorm(D), nn.Linear(D, V, bias=False)

    def layout(self) -> Sequence[mue.Layout]:
        Row, b = mue.Layout, "blocks.*."
        qkv = tuple(f"attention_{x}" for x in "qkv")
        rows = [
            Row("embed.weight", "embedding", ("in", "out")),
            Row(f"{b}qkv.weight", qkv[0], ("out", "in"), parts=qkv),
            Row(f"{b}o.weight", "attention_o", ("out", "in")),
            Row(f"{b}router.weight", "router", ("out", "in")),
            *(Row(f"{b}{x}.weight", f"shared_{x}", ("out", "in")) for x in ("up", "gate", "down")),
            Row("norm.weight", "final_norm", ("vector",)),
            Row("head.weight", "head", ("out", "in")),
        ]
        if "lists" in self.options:
            rows += [Row(f"{b}experts.*.{n}.weight", role, ("out", "in")) for n, role in PARTS.items()]
        else:
            gate_up = ("expert_gate", "expert_up")
            rows.append(Row(f"{b}w13", gate_up[0], ("expert", "in", "out"), parts=gate_up))
            rows.append(Row(f"{b}w2", "expert_down", ("expert", "in", "out")))
        if "bias" in self.options:
            names = ["qkv", "o", *(f"experts.*.{n}" for n in PARTS if "lists" in self.options)]
            rows += [Row(f"{b}{n}.bias", "bias", ("vector",)) for n in names]
        if "shared gate" in self.options:
            rows.append(Row(f"{b}shared_gate.weight", "router", ("out", "in")))
        norms = ["norm1", "norm2", *(n for n in ("end1", "end2") if "ends" in self.options)]
        return [*rows, *(Row(f"{b}{n}.weight", "norm", ("vector",)) for n in norms)]

    def off(self, name: str) -> float:
        """The factor that is put where none belongs."""
        return self.wrong.get(name, 1.0)

    def attention(self, b: Any, x_BTD: Tensor) -> Tensor:
        q, k, v = (t.view(len(x_BTD), T, -1, E).transpose(1, 2) for t in b.qkv(x_BTD).chunk(3, -1))
        scale = self.m.attention_scale * self.off("scale")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.end(b, "end1", b.o(out.transpose(1, 2).reshape(x_BTD.shape)))

    def experts(self, b: Any, x_BTD: Tensor) -> Tensor:
        x = x_BTD.reshape(-1, D)
        weights, picked = b.router(x).softmax(-1).topk(A, -1)
        weights = weights / weights.sum(-1, keepdim=True) * (self.m.route[0] * self.off("R"))
        out = torch.zeros_like(x)
        for e in range(N):
            token, slot = torch.where(picked == e)
            gate, up, down = self.expert(b, e)
            hidden, weight = F.silu(gate(x[token])) * up(x[token]), weights[token, slot, None]
            given = down(hidden * weight) if "before" in self.options else down(hidden) * weight
            out.index_add_(0, token, given.to(out.dtype))
        shared = b.down(F.silu(b.gate(x)) * b.up(x)) * self.off("shared")
        shared = shared * torch.sigmoid(b.shared_gate(x)) if "shared gate" in self.options else shared
        return self.end(b, "end2", ((out + shared) * (self.m.output[0] * self.off("A"))).view(x_BTD.shape))

    def expert(self, b: Any, e: int) -> tuple[Any, Any, Any]:
        """Its three products."""
        if "lists" in self.options:
            return b.experts[e].w1, b.experts[e].w3, b.experts[e].w2
        return lambda x: (x @ b.w13[e])[:, :H], lambda x: (x @ b.w13[e])[:, H:], lambda x: x @ b.w2[e]

    def end(self, b: Any, norm: str, out: Tensor) -> Tensor:
        return getattr(b, norm)(out) if "ends" in self.options else out

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, residual = self.embed(tokens), self.m.residual * self.off("residual")
        for b in self.blocks:
            if "parallel" in self.options:
                x = x + (self.attention(b, b.norm1(x)) + self.experts(b, b.norm2(x))) * residual
            else:
                x = x + self.attention(b, b.norm1(x)) * residual
                x = x + self.experts(b, b.norm2(x)) * residual
        logits = self.head(self.norm(x) * (self.m.head * self.off("head")))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def moe_structure(*options: str, **wrong: float) -> tuple[mue.Plan, MoEStructure, tuple[Tensor, Tensor]]:
    """A plan all of whose multipliers differ from 1, a model drawn by it, and a batch."""
    plan = mue.transfer(BASE, TARGET, mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.1))
    torch.manual_seed(0)
    model = MoEStructure(plan.multipliers, options, wrong)
    plan.init_(model)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    return plan, model, (tokens, tokens.roll(-1, 1))
