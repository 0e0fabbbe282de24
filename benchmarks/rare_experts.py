"""Weight decay of experts that rarely get a token: how large weights settle, measured with torch's AdamW beside the formula.

    python benchmarks/rare_experts.py     # the table of docs/rare-experts.md, in seconds

Gradients are pure noise, alike in size, and come in a part ``f`` of the steps; in the others they are zero, as those of an expert
that is stored with others in one tensor, or absent, as those of one with a tensor of its own.
"""

from __future__ import annotations

import argparse
import math

import torch

LR, DECAY, BETAS = 0.01, 0.1, (0.9, 0.95)
SHARES = (1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005)


def settled(f: float, *, absent: bool = False, lr: float = LR, decay: float = DECAY, elements: int = 1000) -> float:
    """RMS of weights after 4/(lr·decay) steps from zero, averaged over the last quarter.

    Args:
        f: part of the steps in which there is a gradient. absent: it is None in the others, so that AdamW skips the tensor, in place of zero.
    """
    random = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(elements))
    optimizer = torch.optim.AdamW([w], lr=lr, weight_decay=decay, betas=BETAS, eps=1e-12)
    # an absent gradient stops the clock of the tensor as well: as many steps with one
    steps = round(4 / (lr * decay) / (f if absent else 1.0))
    squares = []
    for step in range(steps):
        noise = torch.randn(elements, generator=random)
        if absent:
            w.grad = noise if torch.rand((), generator=random) < f else None
        else:  # each element at times of its own: as many experts as elements
            w.grad = noise * (torch.rand(elements, generator=random) < f)
        optimizer.step()
        if step >= 0.75 * steps:
            squares.append(float(w.detach().square().mean()))
    return math.sqrt(math.fsum(squares) / len(squares))


def expected(f: float, lr: float = LR, decay: float = DECAY, betas: tuple[float, float] = BETAS) -> float:
    """√(η/2λ) · √(k·f / (1 + k·f)), with k = [(1-β1) / (√(1-β2)·(1-β1/√β2))]², the square of what one gradient alone moves, in lr.

    Both limits follow from the variance of a step over twice the decay, η·λ; between them it is interpolated.
    """
    b1, b2 = betas
    alone = (1 - b1) / (math.sqrt(1 - b2) * (1 - b1 / math.sqrt(b2)))
    return math.sqrt(lr / (2 * decay) / (1 + 1 / (alone**2 * f)))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print(
        "| gradient in a part of the steps | RMS of the weights | formula | absent, not zero |\n| --- | --- | --- | --- |"
    )
    for f in SHARES:
        skipped = f"{settled(f, absent=True):.3f}" if f >= 0.3 else "–"
        print(f"| {f:g} | {settled(f):.3f} | {expected(f):.3f} | {skipped} |")


if __name__ == "__main__":
    main()
