"""A controller that holds the mean number of active experts at its target by moving p (2512.13996, section on the PI controller).

e_t = (T - a_t) / N            p_{t+1} = p_0 + K_p · e_t + K_i · Σ_{j ≤ t} e_j            within [low, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOWEST = 1e-3  # p of one expert at up to a thousand of them, whatever their scores


class PIController(nn.Module):
    """Holds p and the sum of errors in buffers, in float64: a resumed run goes on exactly.

    Where p is at a bound, an error that pushes further is not summed (anti-windup): else p would stay there long after the error
    has turned. One step of delay makes it stable while (2·K_p + K_i) · (da/dp)/N < 2, and da/dp grows as a router sharpens: so a
    large K_p, which makes it little faster, costs most.

    Args:
        start: p_0. proportional, integral: K_p and K_i.
    """

    p: Tensor
    error_sum: Tensor

    def __init__(self, start: float, proportional: float, integral: float) -> None:
        super().__init__()
        self.start, self.proportional, self.integral = start, proportional, integral
        self.register_buffer("p", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("error_sum", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def step_(self, error: Tensor) -> None:
        """One step after the optimizer's.

        Args:
            error: e_t, a float64 scalar: positive where fewer experts were active than wanted.
        """
        free = self.start + self.proportional * error + self.integral * (self.error_sum + error)
        wound = ((free > 1.0) & (error > 0)) | ((free < LOWEST) & (error < 0))
        self.error_sum += torch.where(wound, 0.0, error)
        self.p.copy_(free.clamp(LOWEST, 1.0))

    def extra_repr(self) -> str:
        """p_0 and the two factors."""
        return f"start={self.start:g}, proportional={self.proportional:g}, integral={self.integral:g}"
