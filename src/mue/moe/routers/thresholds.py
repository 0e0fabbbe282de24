"""A threshold per expert that follows its scores: what a router learns without a gradient, a loss or a step size.

Shape suffixes: T tokens, N experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.matrix import MatrixRouter


class ThresholdRouter(MatrixRouter):
    """A router with a buffer ``threshold`` (N,): a moving average over optimizer steps of what :meth:`observe` was told.

    A forward pass only adds to what was seen since the last step, as a mean over passes: a recomputed one (activation checkpointing)
    says the same again, and several of one step (gradient accumulation) count alike. Under data parallelism sum ``seen`` and
    ``passes`` over the ranks before :meth:`end_step_`. All of it is in the state dict, so that a resumed run goes on exactly.
    """

    threshold: Tensor
    seen: Tensor
    passes: Tensor
    steps: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("threshold", torch.zeros(self.experts))
        self.register_buffer("seen", torch.zeros(self.experts))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, value_N: Tensor) -> None:
        """Where each expert's threshold would have been right for the tokens of this pass; in training mode only."""
        if self.training:
            self.seen += value_N
            self.passes += 1

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Moves the threshold to what was seen, and forgets it; a step without a forward pass changes nothing."""
        passed = self.passes > 0
        mean_N = self.seen / self.passes.clamp(min=1)
        # a plain mean until as many steps are behind as the average remembers: the first value counts in full
        rate = (1 / (self.steps + 1)).clamp(min=1 - self.options.settings["memory"])
        self.threshold.copy_(
            torch.where(passed, torch.lerp(self.threshold, mean_N, rate.to(mean_N.dtype)), self.threshold)
        )
        self.steps += passed
        self.seen.zero_()
        self.passes.zero_()
