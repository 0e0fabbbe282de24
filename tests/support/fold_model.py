"""A decoder small enough for float64 and 200 steps, with every role, and biases in the multiplied branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mue
from mue.shapes import Block, Transformer


class Norm(nn.Module):
    """RMSNorm with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class FeedForward(nn.Module):
    """SwiGLU with biases in up and down: those inside a multiplied branch are folded as well."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(d, h), nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Stacked experts with a bias on each down projection; every expert computed, unused ones weighted by zero."""

    def __init__(self, d: int, block: Block, route: float) -> None:
        super().__init__()
        N, h = block.experts, block.expert or 0
        self.router = nn.Linear(d, N, bias=False)
        self.up, self.gate = nn.Parameter(torch.zeros(N, h, d)), nn.Parameter(torch.zeros(N, h, d))
        self.down, self.down_bias = nn.Parameter(torch.zeros(N, d, h)), nn.Parameter(torch.zeros(N, d))
        self.active, self.route = block.active, route

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, 1)
        score = self.router(x_TD).sigmoid()
        kept = torch.zeros_like(score).scatter(-1, score.topk(self.active, -1).indices, 1.0) * score
        weight_TE = kept / kept.sum(-1, keepdim=True)
        hidden_ETH = F.silu(x_TD @ self.gate.mT) * (x_TD @ self.up.mT)
        out_ETD = hidden_ETH @ self.down.mT + self.down_bias[:, None]
        return (self.route * (weight_TE.T[..., None] * out_ETD).sum(0)).view_as(x)


class Layer(nn.Module):
    """Attention and feed-forward, with the plan's multipliers where the forward pass has them."""

    def __init__(self, shape: Transformer, block: Block, m: mue.Multipliers, layer: int) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.residual, self.output = shape.num_heads, m.residual, m.output[layer]
        self.scale = m.attention_scale or shape.head_dim**-0.5
        self.n1, self.n2 = Norm(d), Norm(d)
        self.q_norm, self.k_norm = Norm(shape.head_dim), Norm(shape.head_dim)
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.o = nn.Linear(d, d)
        self.ffn = FeedForward(d, block.ffn) if block.ffn else None
        self.experts = Experts(d, block, m.route[layer]) if block.experts else None
        self.shared = FeedForward(d, block.shared_width) if block.shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        y = self.n1(x)
        q, k, v = (f(y).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True, scale=self.scale)
        x = x + self.residual * self.o(mixed.transpose(1, 2).reshape(B, T, d))
        y = self.n2(x)
        branch = sum(part(y) for part in (self.ffn, self.experts, self.shared) if part is not None)
        return x + self.residual * (self.output * branch)


class Decoder(nn.Module):
    """Logits (B, T, V) of tokens (B, T); built with the forward multipliers of a plan."""

    def __init__(self, shape: Transformer, m: mue.Multipliers) -> None:
        super().__init__()
        L = shape.layers
        m = mue.Multipliers(m.residual, m.head, m.attention_scale, m.output or (1.0,) * L, m.route or (1.0,) * L)
        self.multipliers, self.shape = m, shape
        blocks = shape.per_layer
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape, b, m, i) for i, b in enumerate(blocks))
        self.norm = Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.multipliers.head * self.head(self.norm(x))

    def layout(self) -> Sequence[mue.Layout]:
        io, b = ("out", "in"), "layers.*."
        rows = [
            mue.Layout("embedding.weight", "embedding", ("in", "out")),
            *(mue.Layout(f"{b}{x}.weight", f"attention_{x}", io) for x in "qkvo"),
            mue.Layout(f"{b}o.bias", "bias", ("vector",)),
            *(mue.Layout(f"{b}{x}.weight", "norm", ("vector",)) for x in ("n1", "n2")),
            *(mue.Layout(f"{b}{x}_norm.weight", "qk_norm", ("vector",)) for x in "qk"),
            mue.Layout("norm.weight", "final_norm", ("vector",)),
            mue.Layout("head.weight", "head", io),
        ]
        for module, kind in (("ffn", "ffn"), ("shared", "shared")):
            rows += [mue.Layout(f"{b}{module}.{x}.weight", f"{kind}_{x}", io) for x in ("up", "gate", "down")]
            rows += [mue.Layout(f"{b}{module}.{x}.bias", "bias", ("vector",)) for x in ("up", "down")]
        rows += [
            *(mue.Layout(f"{b}experts.{x}", f"expert_{x}", ("expert", *io)) for x in ("up", "gate", "down")),
            mue.Layout(f"{b}experts.down_bias", "bias", ("expert", "vector")),
            mue.Layout(f"{b}experts.router.weight", "router", io),
        ]
        names = [n for n, _ in self.named_parameters(remove_duplicate=False)]
        return [row for row in rows if any(row.regex.fullmatch(n) for n in names)]


def tokens(vocab: int = 11, seed: int = 0) -> Tensor:
    """A batch (4, 7) of random tokens."""
    return torch.randint(vocab, (4, 7), generator=torch.Generator().manual_seed(seed))


def train(
    model: Decoder,
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    *,
    start: int = 0,
    schedule: int | None = 200,
    clip: Callable[[], Tensor] | None = None,
) -> list[float]:
    """``steps`` steps on fresh tokens each, lr falling linearly; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / schedule if schedule else 1)
            optimizer.zero_grad()
        batch = tokens(seed=step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            clip()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses
