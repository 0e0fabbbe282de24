# ruff: noqa: N815 (shape suffixes in field names)
"""The matrices of one MoE block, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mue.moe.routing import Routing


@dataclass
class ExpertWeights:
    """The matrices of one MoE block, (out, in) as in nn.Linear, expert axis first.

    Attributes:
        gate_NHD, up_NHD, down_NDH: routed experts; all None where there are none. gate None means gelu(up x).
        shared_gate_SD, shared_up_SD, shared_down_DS: the shared experts as one FFN of width S = n_s * h_s (the sum over
            experts of down_i(act_i) is one product over the concatenated width). None where there are none.
    """

    gate_NHD: Tensor | None = None
    up_NHD: Tensor | None = None
    down_NDH: Tensor | None = None
    shared_gate_SD: Tensor | None = None
    shared_up_SD: Tensor | None = None
    shared_down_DS: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """All six, in the order above."""
        routed = (self.gate_NHD, self.up_NHD, self.down_NDH)
        return (*routed, self.shared_gate_SD, self.shared_up_SD, self.shared_down_DS)

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The same with every matrix that is there changed."""
        return ExpertWeights(*(None if matrix is None else change(matrix) for matrix in self.matrices))


def check(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> None:
    """Refuses shapes that broadcasting or a slice would otherwise swallow, with a ValueError that names them."""
    if x_TD.dim() != 2 or x_TD.shape[0] != routing.num_tokens:
        raise ValueError(f"x must be ({routing.num_tokens} tokens, width) for this routing, got {tuple(x_TD.shape)}")
    width, matrices = x_TD.shape[1], weights.matrices
    routed = _check_ffn("expert", (routing.num_experts,), width, *matrices[:3])
    shared = _check_ffn("shared", (), width, *matrices[3:])
    if not routed and not shared:
        raise ValueError("there are neither routed nor shared experts: give up and down of at least one")
    if not routed and routing.num_pairs:
        raise ValueError(f"the routing has {routing.num_pairs} pairs but there are no routed experts")


def _check_ffn(
    name: str, lead: tuple[int, ...], width: int, gate: Tensor | None, up: Tensor | None, down: Tensor | None
) -> bool:
    """True if this FFN is there; ValueError if it is there in part or with other shapes than the first."""
    shapes = [
        f"{part} {None if matrix is None else tuple(matrix.shape)}"
        for part, matrix in (("gate", gate), ("up", up), ("down", down))
    ]
    if up is None or down is None:
        if gate is not None or up is not None or down is not None:
            raise ValueError(f"{name} weights need both up and down (or none), got {', '.join(shapes)}")
        return False
    # the inner width is taken from up; 0 fits nothing, so that a tensor of other dimensions is named below
    inner = up.shape[-2] if up.dim() == len(lead) + 2 else 0
    wide, tall = (*lead, inner, width), (*lead, width, inner)
    if up.shape != wide or down.shape != tall or (gate is not None and gate.shape != wide):
        raise ValueError(f"{name} weights must be gate, up {wide} and down {tall}, (out, in); got {', '.join(shapes)}")
    return True
