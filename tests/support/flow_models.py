"""Transformers of many makes whose parameters have names that say nothing, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, SIZE, FFN, VOCAB, LAYERS = 32, 4, 8, 48, 96, 2


@dataclass(frozen=True)
class Make:
    """How a transformer is made.

    Attributes:
        norm: ``layer``, ``rms``, ``manual`` or ``shifted`` (the code adds 1). place: of norms: ``pre``, ``post`` or ``sandwich``.
        order: in which q, k and v lie in one matrix; empty where they are three. groups: of keys and values.
        in_turn: q, k and v lie head by head, gate and up row by row, and not one after another.
        scores: ``kernel`` or ``einsum``. gate: ``""``, ``apart``, ``gate first`` or ``up first``.
        act: of the feed-forward. experts: ``""``, ``list``, ``stack`` or ``stack, transposed``.
        parallel: attention and feed-forward read the same stream. positions: ``""``, ``lookup`` or ``slice``.
    """

    norm: str = "rms"
    place: str = "pre"
    order: str = "qkv"
    groups: int = 4
    in_turn: bool = False
    scores: str = "kernel"
    rotary: bool = False
    qk_norm: bool = False
    bias: bool = False
    gate: str = "gate first"
    act: str = "silu"
    experts: str = ""
    shared: bool = False
    parallel: bool = False
    tied: bool = False
    positions: str = ""


class Nameless(nn.Module):
    """``truth`` says what every parameter is: name → (roles of its parts, axes, start of a gain)."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make, self.truth = make, {}
        self.blocks = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        self.table = self._new(self, ("embedding",), (VOCAB, D), ("in", "out"))
        if make.positions:
            self.places = self._new(self, ("position",), (64, D), ("in", "out"))
        for n, block in enumerate(self.blocks):
            self._block(block, f"blocks.{n}.")
        self._norm(self, "last", "", D, "final_norm")
        if not make.tied:
            self.out = self._new(self, ("head",), (VOCAB, D), ("out", "in"))

    def _new(
        self, owner: nn.Module, roles: tuple[str, ...], shape: tuple[int, ...], axes: tuple[str, ...], prefix: str = ""
    ) -> nn.Parameter:
        """A parameter under a name that says nothing; gains and biases at what they start at."""
        name = f"p{len(self.truth):03d}"
        zero = roles == ("bias",) or (self.make.norm == "shifted" and roles[0].endswith("norm"))
        drawn = torch.randn(shape) * 0.1
        start = torch.zeros(shape) if zero else torch.ones(shape) if roles[0].endswith("norm") else drawn
        parameter = nn.Parameter(start)
        owner.register_parameter(name, parameter)
        self.truth[prefix + name] = (roles, axes, float(not zero) if roles[0].endswith("norm") else None)
        return parameter

    def _norm(self, owner: nn.Module, name: str, prefix: str, size: int, role: str = "norm") -> None:
        gain = self._new(owner, (role,), (size,), ("vector",), prefix)
        bias = self._new(owner, ("bias",), (size,), ("vector",), prefix) if self.make.norm == "layer" else None
        object.__setattr__(owner, name, (gain, bias))

    def _matrix(self, owner: nn.Module, name: str, prefix: str, roles: tuple[str, ...], out: int, into: int) -> None:
        weight = self._new(owner, roles, (out, into), ("out", "in"), prefix)
        bias = self._new(owner, ("bias",), (out,), ("vector",), prefix) if self.make.bias else None
        object.__setattr__(owner, name, (weight, bias))

    def _block(self, block: nn.Module, prefix: str) -> None:
        make, few = self.make, self.make.groups * SIZE
        names = ("before_a", "before_f") if make.place == "pre" else ("after_a", "after_f")
        for name in (*names, *(("before_a", "before_f") if make.place == "sandwich" else ())):
            self._norm(block, name, prefix, D)
        sizes = {"q": D, "k": few, "v": few}
        if make.order:
            fused = tuple(f"attention_{one}" for one in make.order)
            self._matrix(block, "qkv", prefix, fused, sum(sizes.values()), D)
        else:
            for one, size in sizes.items():
                self._matrix(block, one, prefix, (f"attention_{one}",), size, D)
        if make.qk_norm:
            self._norm(block, "q_norm", prefix, SIZE, "qk_norm")
            self._norm(block, "k_norm", prefix, SIZE, "qk_norm")
        self._matrix(block, "o", prefix, ("attention_o",), D, D)
        if not make.experts:
            self._feed(block, "ffn", prefix, "ffn")
            return
        self._matrix(block, "router", prefix, ("router",), 6, D)
        if make.experts == "list":
            block.many = nn.ModuleList(nn.Module() for _ in range(6))
            for n, expert in enumerate(block.many):
                self._feed(expert, "ffn", f"{prefix}many.{n}.", "expert")
        else:
            turned = "transposed" in make.experts
            parts = self._parts("expert")
            axes, size = ("expert", "out", "in"), (6, FFN * len(parts), D)
            flipped = ("expert", "in", "out")
            block.up = self._new(
                block, parts, (size[0], D, size[1]) if turned else size, flipped if turned else axes, prefix
            )
            down = (6, FFN, D) if turned else (6, D, FFN)
            block.down = self._new(block, ("expert_down",), down, flipped if turned else axes, prefix)
        if make.shared:
            self._feed(block, "ffn", prefix, "shared")

    def _parts(self, kind: str) -> tuple[str, ...]:
        up, gate = f"{kind}_up", f"{kind}_gate"
        return {"gate first": (gate, up), "up first": (up, gate)}.get(self.make.gate, (up,))

    def _feed(self, owner: nn.Module, name: str, prefix: str, kind: str) -> None:
        parts = self._parts(kind)
        self._matrix(owner, f"{name}_up", prefix, parts, FFN * len(parts), D)
        if self.make.gate == "apart":
            self._matrix(owner, f"{name}_gate", prefix, (f"{kind}_gate",), FFN, D)
        self._matrix(owner, f"{name}_down", prefix, (f"{kind}_down",), D, FFN)

    # ---- forward

    def _normed(self, x: Tensor, gain: tuple[Tensor, Tensor | None]) -> Tensor:
        w, b = gain
        if self.make.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], w, b)
        if self.make.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], w)
        size = x.float().pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(size + 1e-6) * (w + 1 if self.make.norm == "shifted" else w)

    def _act(self, x: Tensor) -> Tensor:
        if self.make.act == "by hand":
            return x * torch.sigmoid(x)
        return {"silu": F.silu, "gelu": F.gelu, "relu2": lambda y: F.relu(y) ** 2}[self.make.act](x)

    def cut_pair(self, h: Tensor) -> tuple[Tensor, ...]:
        """The two parts of a gated feed-forward's first product, along its last axis."""
        return (h[..., ::2], h[..., 1::2]) if self.make.in_turn else h.chunk(2, -1)

    def fused_order(self, roles: tuple[str, ...]) -> str:
        """How the parts of a matrix lie."""
        if len(roles) == 1 or not self.make.in_turn:
            return "blocks"
        # one head of keys: its turn is the whole
        return "rows" if len(roles) == 2 else "heads" if self.make.groups > 1 else "blocks"

    def cut_qkv(self, fused: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values of a fused projection, along its last axis."""
        make, turns = self.make, self.make.groups if self.make.in_turn else 1
        sizes = {"q": D // turns, "k": make.groups * SIZE // turns, "v": make.groups * SIZE // turns}
        parts = fused.unflatten(-1, (turns, -1)).split([sizes[one] for one in make.order], -1)
        return {one: part.flatten(-2) for one, part in zip(make.order, parts, strict=True)}

    def _bent(self, h: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            return self._act(gate) * h
        if self.make.gate in ("gate first", "up first"):
            a, b = self.cut_pair(h)
            return self._act(a) * b if self.make.gate == "gate first" else a * self._act(b)
        return self._act(h)

    def _dense(self, owner: nn.Module, x: Tensor) -> Tensor:
        gate = F.linear(x, *owner.ffn_gate) if self.make.gate == "apart" else None
        return F.linear(self._bent(F.linear(x, *owner.ffn_up), gate), *owner.ffn_down)

    def _routed(self, block: nn.Module, x: Tensor) -> Tensor:
        weight, chosen = F.linear(x, *block.router).softmax(-1).topk(2)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.make.experts == "list":
            y = torch.zeros_like(x)
            for n, expert in enumerate(block.many):
                at = (chosen == n).nonzero(as_tuple=True)
                y[at[:-1]] += self._dense(expert, x[at[:-1]]) * weight[at][:, None]
        else:
            up, down = ("ndh", "nhd") if "transposed" in self.make.experts else ("nhd", "ndh")
            h = self._bent(torch.einsum(f"btd,{up}->btnh", x, block.up))
            every = torch.einsum(f"btnh,{down}->btnd", h, block.down)
            y = (every.gather(2, chosen[..., None].expand(*chosen.shape, D)) * weight[..., None]).sum(2)
        return y + self._dense(block, x) if self.make.shared else y

    def _rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(SIZE // 2) / (SIZE // 2))
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def _attention(self, block: nn.Module, x: Tensor) -> Tensor:
        make = self.make
        if make.order:
            by = self.cut_qkv(F.linear(x, *block.qkv))
        else:
            by = {one: F.linear(x, *getattr(block, one)) for one in "qkv"}
        q, k, v = (by[one].unflatten(-1, (-1, SIZE)).transpose(1, 2) for one in "qkv")
        if make.qk_norm:
            q, k = self._normed(q, block.q_norm), self._normed(k, block.k_norm)
        if make.rotary:
            q, k = self._rotated(q), self._rotated(k)
        k, v = (t.repeat_interleave(HEADS // make.groups, 1) for t in (k, v))
        if make.scores == "kernel":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / SIZE**0.5
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            y = torch.einsum("bhij,bhjd->bhid", scores.masked_fill(mask, -1e9).softmax(-1), v)
        return F.linear(y.transpose(1, 2).flatten(2), *block.o)

    def forward(self, ids: Tensor) -> Tensor:
        make, x = self.make, self.table[ids]
        if make.positions:
            t = ids.shape[1]
            x = x + (self.places[:t] if make.positions == "slice" else F.embedding(torch.arange(t), self.places))
        for block in self.blocks:
            first = self._normed(x, block.before_a) if make.place != "post" else x
            mixed = self._attention(block, first)
            feed = self._routed if make.experts else self._dense
            if make.place == "post":
                x = self._normed(x + mixed, block.after_a)
                x = self._normed(x + feed(block, x), block.after_f)
                continue
            y = self._normed(mixed, block.after_a) if make.place == "sandwich" else mixed
            second = x if make.parallel else x + y
            fed = feed(block, self._normed(second, block.before_f))
            fed = self._normed(fed, block.after_f) if make.place == "sandwich" else fed
            x = x + y + fed if make.parallel else second + fed
        return F.linear(self._normed(x, self.last), self.table if make.tied else self.out)
