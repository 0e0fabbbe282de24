"""The base's own habits, declared and never guessed."""

from __future__ import annotations

from dataclasses import dataclass

from mue.shapes import DECOUPLED
from mue.util.errors import explain_calls, positive, true_or_false


@explain_calls
@dataclass(frozen=True)
class Convention:
    """The base's own habits, declared and never guessed (``[base.convention]``).

    Attributes:
        attention_scale: ``"1/sqrt(d)"`` (head size), ``"1/d"``, or a number: what the base multiplies its logits by.
        weight_decay: ``"decoupled"`` (torch: ``p *= 1 - lr·wd``) or ``"independent"`` (``p *= 1 - wd``).
        depth_scaled_init: the base draws o and down with std/√(2L*).
    """

    attention_scale: str | float = "1/sqrt(d)"
    weight_decay: str = "decoupled"
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        scales = ("1/sqrt(d)", "1/d")
        if isinstance(self.attention_scale, str):
            if self.attention_scale not in scales:
                raise ValueError(f"attention_scale must be one of {scales} or a number, got {self.attention_scale!r}")
        else:
            object.__setattr__(self, "attention_scale", positive("attention_scale", self.attention_scale))
        forms = ("decoupled", "independent")
        if self.weight_decay not in forms:
            raise ValueError(f"convention weight_decay must be one of {forms}, got {self.weight_decay!r}")
        true_or_false("depth_scaled_init", self.depth_scaled_init)

    def check_optimizer(self, optimizer: str) -> None:
        """``ValueError`` where the form of weight decay and the optimizer contradict each other."""
        if self.weight_decay == "independent" and optimizer not in DECOUPLED:
            raise ValueError(
                f'convention weight_decay = "independent" speaks of torch\'s decoupled decay, but {optimizer!r} has its own'
                " form: leave the convention out"
            )

    def scale(self, head_dim: int) -> float:
        """The base's attention scale as a number."""
        if isinstance(self.attention_scale, str):
            # a stock model's, or µP's (2203.03466), for trained queries and keys are aligned
            return head_dim**-0.5 if self.attention_scale == "1/sqrt(d)" else 1.0 / head_dim
        return float(self.attention_scale)
