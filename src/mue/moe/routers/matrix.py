"""What routers that score experts by one matrix have in common: the matrix, and logits in full precision.

Shape suffixes: T tokens, D width, N experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.moe.routers.base import BaseRouter


class MatrixRouter(BaseRouter):
    """A router whose only parameter is ``weight`` (N, D), fan-in D."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weight = nn.Parameter(torch.empty(self.experts, self.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A plain start; the plan draws the real one."""
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, N) in float32 (float64 for float64 input), also under autocast: rounded logits would move the selection."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))
