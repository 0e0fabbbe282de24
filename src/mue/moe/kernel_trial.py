"""Whether a built kernel computes rightly, run in a process of its own by `build`: it may crash."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mue.kernels import library
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
        for ours, theirs in zip(*found, strict=True):
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error < bound:
                sys.exit(f"{engine}: off by {error:.1e} for {tokens} tokens, {number} experts, d{width} h{inner}")
