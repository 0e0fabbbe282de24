"""One tiny transformer in the structures that families have, with a plan's multipliers in its forward pass, right or wrong.

Shape suffixes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mue

D, L, V, T, E = 32, 3, 64, 16, 8
BASE = mue.Dense(width=16, ffn=32, layers=1, head_dim=E, sequence=T, vocab=V, gated=False)
TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.1)


@dataclass
class Returned:
    """What a model may return, as a dataclass that is no mapping."""

    loss: Tensor | None
    logits: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits": lambda logits, loss: logits,
    "loss": lambda logits, loss: loss,
    "logits, loss": lambda logits, loss: (logits, loss),
    "loss, logits": lambda logits, loss: (loss, logits),
    "dict of loss": lambda logits, loss: {"loss": loss},
    "dict": lambda logits, loss: {"loss": loss, "logits": logits},
    "dataclass": lambda logits, loss: Returned(loss, logits),
    "dataclass of loss": lambda logits, loss: Returned(loss, None),
}


class Structure(nn.Module):
    """A dense transformer.

    Args:
        multipliers: the plan's.
        positions: "", "table" (looked up), "parameter" (sliced) or "waves" (a buffer). block: "serial", "parallel" (one sum),
            "in place" (Falcon), "in turn" (Command-R) or "after" (a norm after each addition).
        ends: a norm ends each branch (sandwich). entry: a norm after the embedding. inner: one inside the feed-forward.
        activation: of the feed-forward. output: of :data:`OUTPUTS`.
        softcap: on logits. wrong: by what one of "attention", "feed-forward", "stream", "embedding", "head" or "attention scale"
            is multiplied that should not be; with "loss", the head's in the loss alone.
    """

    def __init__(
        self,
        multipliers: Any,
        *,
        positions: str = "",
        block: str = "serial",
        ends: bool = False,
        entry: bool = False,
        inner: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        tied: bool = False,
        output: str = "dict",
        softcap: float = 0.0,
        wrong: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.m, self.positions, self.block, self.tied = multipliers, positions, block, tied
        self.output, self.softcap, self.wrong, self.activation = output, softcap, wrong or {}, activation
        self.embed = nn.Embedding(V, D)
        if positions == "table":
            self.wpe = nn.Embedding(T, D)
        elif positions == "parameter":
            self.wpe = nn.Parameter(torch.zeros(1, T, D))
        elif positions == "waves":
            self.register_buffer("wpe", torch.randn(T, D), persistent=False)
        self.entry = nn.LayerNorm(D) if entry else None
        self.blocks = nn.ModuleList(nn.Module() for _ in range(L))
        for b in self.blocks:
            for name in "qkvo":
                setattr(b, name, nn.Linear(D, D, bias=False))
            b.up, b.down = nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)
            b.norm1, b.norm2 = nn.RMSNorm(D), nn.LayerNorm(D)
            if inner:
                b.norm3 = nn.RMSNorm(2 * D)
            if ends:
                b.end1, b.end2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def layout(self) -> Sequence[mue.Layout]:
        Row = mue.Layout
        rows = [Row("embed.weight", "embedding", ("in", "out"))]
        if self.positions == "table":
            rows.append(Row("wpe.weight", "position", ("in", "out")))
        elif self.positions == "parameter":
            rows.append(Row("wpe", "position", ("vector", "in", "out")))
        rows += [Row(f"blocks.*.{x}.weight", f"attention_{x}", ("out", "in")) for x in "qkvo"]
        rows += [Row(f"blocks.*.{x}.weight", f"ffn_{x}", ("out", "in")) for x in ("up", "down")]
        names = [n for n, _ in self.named_parameters()]
        vectors = {
            n.replace("blocks.0.", "blocks.*.") for n in names if "norm" in n or "end" in n or n.startswith("entry")
        }
        for n in sorted(v for v in vectors if not v.startswith(("blocks.1", "blocks.2")) and v != "norm.weight"):
            rows.append(Row(n, "bias" if n.endswith("bias") else "norm", ("vector",)))
        return [*rows, Row("norm.weight", "final_norm", ("vector",)), Row("head.weight", "head", ("out", "in"))]

    def off(self, name: str) -> float:
        """The factor that is put where none belongs."""
        return self.wrong.get(name, 1.0)

    def attention(self, b: Any, x: Tensor) -> Tensor:
        q, k, v = (getattr(b, n)(x).view(*x.shape[:2], -1, E).transpose(1, 2) for n in "qkv")
        scale = self.m.attention_scale * self.off("attention scale")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return b.o(out.transpose(1, 2).reshape(x.shape))

    def branches(self, b: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches, of a serial block one at a time."""
        return self.end(b, "end1", self.attention(b, x), "attention"), self.feed_forward(b, y)

    def feed_forward(self, b: Any, y: Tensor) -> Tensor:
        hidden = self.activation(b.up(y))
        hidden = b.norm3(hidden) if hasattr(b, "norm3") else hidden
        return self.end(b, "end2", b.down(hidden) * self.m.output[0], "feed-forward")

    def end(self, b: Any, norm: str, out: Tensor, kind: str) -> Tensor:
        return (getattr(b, norm)(out) if hasattr(b, norm) else out) * (self.m.residual * self.off(kind))

    def step(self, b: Any, x: Tensor) -> Tensor:
        kept = x * self.off("stream")
        if self.block == "serial":
            x = kept + self.end(b, "end1", self.attention(b, b.norm1(x)), "attention")
            return x + self.feed_forward(b, b.norm2(x))
        if self.block == "after":
            x = b.norm1(kept + self.end(b, "end1", self.attention(b, x), "attention"))
            return b.norm2(x + self.feed_forward(b, x))
        a, f = self.branches(b, b.norm1(x), b.norm2(x))
        if self.block == "parallel":
            return a + f + kept
        if self.block == "in turn":
            return kept + a + f
        f += a
        return kept + f

    def forward(self, tokens: Tensor, targets: Tensor) -> Any:
        x = self.embed(tokens) * self.off("embedding")
        if self.positions == "table":
            x = x + self.wpe(torch.arange(tokens.shape[1]))
        elif self.positions:
            x = x + self.wpe[..., : tokens.shape[1], :]
        x = x if self.entry is None else self.entry(x)
        for b in self.blocks:
            x = self.step(b, x)
        logits = self.head(self.norm(x)) * (self.m.head * self.off("head"))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        loss = F.cross_entropy((logits * self.off("loss")).flatten(0, 1), targets.flatten())
        return OUTPUTS[self.output](logits, loss)


def structure(**options: Any) -> tuple[mue.Plan, Structure, tuple[Tensor, Tensor]]:
    """A plan all of whose multipliers differ from 1, a model in one structure, drawn by it, and a batch."""
    tied = options.get("tied", False)
    target = mue.Dense(width=D, ffn=2 * D, layers=L, head_dim=E, sequence=T, vocab=V, gated=False, tied=tied)
    plan = mue.transfer(BASE, target, TUNED)
    torch.manual_seed(0)
    model = Structure(plan.multipliers, **options)
    plan.init_(model)
    tokens = torch.randint(V, (2, T))
    return plan, model, (tokens, tokens.roll(-1, 1))
