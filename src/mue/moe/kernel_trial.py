"""Whether a built kernel computes rightly, run in a process of its own by `build`: it may crash."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.kernels import library, sublayer
from mue.moe import Routing
from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts


def main(path: str, engine: str) -> None:
    """Compares `engine` of the library at `path` with the reference; ends with 1 and says so where they differ."""
    kernel = library.load(Path(path))
    print("offers", library.offered(kernel))
    library.loaded, library.engine = lambda: kernel, lambda: engine  # type: ignore[assignment]
    torch.manual_seed(0)
    # Two orders of summation: float32 differs by some 1e-7 a term; bf16 has eight bits (2^-8 = 0.4 %) and rounds rows,
    # hidden rows and outputs. A wrong layout is off by 100 %.
    dtype, bound = (torch.float32, 1e-5) if engine == "plain" else (torch.bfloat16, 0.05)
    # Many rows an expert; experts without any, and no shared ones; two experts for all. The widths are multiples of 32,
    # or bf16 would be computed in float32 (mue.moe.backends.native).
    for tokens, number, active, width, inner, shared in (
        (70, 6, 2, 64, 96, 32),
        (9, 40, 3, 32, 64, 0),
        (300, 2, 1, 128, 64, 64),
    ):
        x = torch.randn(tokens, width, requires_grad=True)
        shapes: list[tuple[int, ...]] = [(number, inner, width), (number, inner, width), (number, width, inner)]
        shapes += [(shared, width), (shared, width), (width, shared)] if shared else []
        matrices = [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
        weight = torch.rand(tokens, active, requires_grad=True)
        expert = torch.rand(tokens, number).topk(active, 1).indices
        found = []
        for backend in ("native", "reference"):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                routing = Routing.from_topk(expert, weight, number, stats=False)
                y = experts(x, routing, ExpertWeights(*matrices), backend)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, weight, *matrices])])
        _compare(f"{engine}, {tokens} tokens, {number} experts, d{width} h{inner}", found[0], found[1], bound)
    if engine != "matrix unit":  # the sublayers have no products by it, and are torch's then (mue.kernels.library)
        _try_sublayers(engine, half=dtype == torch.bfloat16, bound=bound)


def _try_sublayers(engine: str, half: bool, bound: float) -> None:
    """Attention and the dense feed-forward network, from norm to sum."""
    B, T, D, H, K, E, F_ = 3, 40, 64, 4, 2, 16, 96  # two query heads for each key head
    x = torch.randn(B, T, D, requires_grad=True)
    angle = torch.arange(T)[:, None] * torch.rand(E // 2)
    turn = torch.stack((angle.cos(), angle.sin()), -1)[:, None].contiguous()

    def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
        return [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]

    gains = [(torch.rand(width) + 0.5).requires_grad_() for width in (D, E, E)]
    q, k, v, o = matrices((H * E, D), (K * E, D), (K * E, D), (D, H * E))
    gate, up, down = matrices((F_, D), (F_, D), (D, F_))

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, 1e-6)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.view_as_complex(turn)
        return torch.view_as_real(pairs).flatten(-2)

    def attention() -> Tensor:
        n = normed(x, gains[0])
        heads = [(n @ matrix.mT).view(B, T, -1, E) for matrix in (q, k, v)]
        heads[:2] = [turned(normed(head, gain)) for head, gain in zip(heads, gains[1:], strict=False)]
        q_BHTE, k_BKTE, v_BKTE = (head.transpose(1, 2) for head in heads)
        y = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=True)
        return x + 0.7 * (y.transpose(1, 2).flatten(-2) @ o.mT)

    def feed_forward() -> Tensor:
        n = normed(x, gains[0])
        return x + 0.7 * (F.silu(n @ gate.mT) * (n @ up.mT)) @ down.mT

    of_attention, of_ffn = [gains[0], q, k, v, *gains[1:], o], [gains[0], gate, up, down]
    attended = sublayer.attention(x, of_attention, turn, scale=E**-0.5, residual=0.7, eps=1e-6, half=half)
    fed = sublayer.feed_forward(x, of_ffn, residual=0.7, eps=1e-6, half=half)
    for name, weights, ours, theirs in (
        ("attention", of_attention, attended, attention()),
        ("feed-forward", of_ffn, fed, feed_forward()),
    ):
        mine, exact = ([y, *torch.autograd.grad(y.square().sum(), [x, *weights])] for y in (ours, theirs))
        _compare(f"{engine}, {name}", mine, exact, bound)


def _compare(what: str, ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    """Ends with 1 where a tensor is further off than `bound`, relative to its norm."""
    for mine, exact in zip(ours, theirs, strict=True):
        error = ((mine - exact).norm() / exact.norm()).item()
        if not error < bound:
            sys.exit(f"off by {error:.1e}: {what}")
