"""The decoder of :mod:`support.own_models.lists` with experts that are chains: their matrices have numbers, and no names."""

from __future__ import annotations

from typing import Any

from torch import nn

import mue
from support.own_models.lists import Lists


class Chains(Lists):
    def __init__(self, shape: Any, multipliers: mue.Multipliers) -> None:
        super().__init__(shape, multipliers)
        d, h = shape.width, shape.expert
        for block in self.h:
            block.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d)) for _ in range(shape.experts)
            )
        self.rows = {
            "fc": mue.Layout("h.*.experts.*.0.weight", "expert_up", ("out", "in")),
            "proj": mue.Layout("h.*.experts.*.2.weight", "expert_down", ("out", "in")),
            "bias fc": mue.Layout("h.*.experts.*.*.bias", "bias", ("vector",)),
        }

    def layout(self) -> list[mue.Layout]:
        return [row for row in super().layout() if row.pattern != "h.*.experts.*.proj.bias"]
