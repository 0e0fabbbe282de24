"""A pool: one set of routed experts that several layers read, each with a router of its own (UniPool, 2605.06665).

Shape suffixes: N experts, D width, H expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExpertPool(nn.Module):
    """The matrices of N experts, owned by a model and read by its layers (``mue.moe.MoELayer(pool=...)``).

    Parameters: `gate`, `up` (N, H, D) and `down` (N, D, H); no `gate` where experts have none. They are in the state dict, the
    parameter count and the optimizer once, and their gradient is the sum over the layers that read them.

    Args:
        width: D.
        experts: N.
        expert_width: H.
        gated: SwiGLU; else gelu(up x).

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, width: int, experts: int, expert_width: int, *, gated: bool = True) -> None:
        super().__init__()
        if min(width, experts, expert_width) < 1:
            raise ValueError(f"width={width}, experts={experts}, expert_width={expert_width} must be >= 1")
        self.width, self.experts, self.expert_width = width, experts, expert_width
        self.gate = weight(gated, experts, expert_width, width)
        self.up = weight(True, experts, expert_width, width)
        self.down = weight(True, experts, width, expert_width)

    @property
    def matrices(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """gate, up, down."""
        return self.gate, self.up, self.down

    def extra_repr(self) -> str:
        """The numbers, in the order of the signature."""
        return f"width={self.width}, experts={self.experts}, expert_width={self.expert_width}, gated={self.gate is not None}"


def weight(present: bool, *shape: int) -> nn.Parameter | None:
    """A parameter with a plain start, where it is there; the plan draws the real one."""
    return nn.Parameter(torch.empty(shape).normal_(std=0.02)) if present else None
