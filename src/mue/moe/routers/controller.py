"""A controller that holds the mean number of active experts at its target by moving p (2512.13996, section on the PI controller).

e_t = (T - a_t) / N            s_{t+1} = s_0 + K_p · e_t + K_i · Σ_{j ≤ t} e_j

The paper moves p itself, s = p. Ours is s = -ln(1 - p), the mass that is left out in logarithms: as a router sharpens in training, T
experts have nearly all of its mass, and da/dp grows without bound while da/ds does not. With s = p the controller of our first runs swung
between one expert and all of them from step 100 on (docs/routers.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOWEST = 1e-3  # p of one expert at up to a thousand of them, whatever their scores
HIGHEST = 1.0 - 1e-7  # where -ln(1 - p) is moved: float32 knows no mass between it and 1
MOVES = ("tail", "p")


class PIController(nn.Module):
    """Holds p and the sum of errors in buffers, in float64: a resumed run goes on exactly.

    Where p is at a bound, an error that pushes further is not summed (anti-windup): else p would stay there long after the error
    has turned. One step of delay makes it stable while (2·K_p + K_i) · (da/ds)/N < 2: so a large K_p, which makes it little faster,
    costs most. With s = -ln(1 - p) da/ds is below N for every router, for it is (1 - p) over the mass of the last expert taken, and each of
    the N - a experts that are left has no more than that: 2·K_p + K_i < 2 is enough, however sharp the router becomes.

    Args:
        start: p_0. proportional, integral: K_p and K_i. moves: of :data:`MOVES`: ``"tail"`` for s = -ln(1 - p), ``"p"`` for p itself.
    """

    p: Tensor
    error_sum: Tensor

    def __init__(self, start: float, proportional: float, integral: float, moves: str = "tail") -> None:
        super().__init__()
        assert moves in MOVES, moves
        self.start, self.proportional, self.integral, self.moves = start, proportional, integral, moves
        self.register_buffer("p", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("error_sum", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def step_(self, error: Tensor) -> None:
        """One step after the optimizer's.

        Args:
            error: e_t, a float64 scalar: positive where fewer experts were active than wanted.
        """
        moved = self.proportional * error + self.integral * (self.error_sum + error)
        if self.moves == "tail":
            free, high = -torch.expm1(math.log1p(-min(self.start, HIGHEST)) - moved), HIGHEST
        else:
            free, high = self.start + moved, 1.0
        wound = ((free > high) & (error > 0)) | ((free < LOWEST) & (error < 0))
        self.error_sum += torch.where(wound, 0.0, error)
        self.p.copy_(free.clamp(LOWEST, high))

    def extra_repr(self) -> str:
        """p_0, the two factors and what they move."""
        return f"start={self.start:g}, proportional={self.proportional:g}, integral={self.integral:g}, moves={self.moves!r}"
