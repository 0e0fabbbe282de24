"""The CUDA backend: torch's grouped products over rows in expert order, under ordinary autograd; nothing waits for the GPU.

Padding pairs are rows of the last expert with weight 0. Shape suffixes: T tokens, K slots, P pairs (also as rows in expert
order), N experts, D width, H expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.expert_weights import ExpertWeights
from mue.moe.routing import Routing, expert_load

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    """Why this backend cannot compute this; None where it can. (On a CPU it can, slowly; "auto" takes it on CUDA.)"""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype not in _TYPES:
        return f"grouped_mm computes in {', '.join(map(str, _TYPES))}, not in {dtype}"
    if x_TD.is_cuda:
        if dtype != torch.bfloat16:
            return f"grouped_mm on CUDA computes in bfloat16, not in {dtype}"
        if torch.cuda.get_device_capability(x_TD.device) < (8, 0):
            return "grouped_mm needs an Ampere GPU or newer"
        if weights.up_NHD is not None and any(size % 8 for size in weights.up_NHD.shape[1:]):
            return f"grouped_mm needs widths that are multiples of 8, got {tuple(weights.up_NHD.shape[1:])}"
    return None


def run(x_TD: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """(T, D), the routed experts."""
    gate_NHD, up_NHD, down_NDH = weights.matrices[:3]
    assert up_NHD is not None and down_NDH is not None
    tokens, pairs, number = routing.num_tokens, routing.num_pairs, routing.num_experts
    if x_TD.is_cuda or torch.compiler.is_compiling():  # no waiting for the GPU, no graph break
        within = (routing.expert_P >= 0) & (routing.expert_P <= number)
        torch._assert_async(within.all(), "expert_P holds an index outside [0, num_experts]")
    else:
        expert_load(routing)
    if pairs == 0:
        return x_TD.new_zeros(tokens, x_TD.shape[1])
    expert_P, order_P = torch.sort(routing.expert_P, stable=True)
    end_N = torch.searchsorted(expert_P, torch.arange(number, device=expert_P.device), right=True).to(torch.int32)
    # padding pairs, sorted last, join the last group: every row has an owner, and its result is written
    end_N = torch.cat((end_N[:-1], end_N.new_full((1,), pairs)))
    inverse_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(pairs, device=order_P.device))
    x_PD = _Spread.apply(x_TD, routing.token_P, order_P, inverse_P, routing.slots)  # type: ignore[no-untyped-call]
    up_PH = F.grouped_mm(x_PD, up_NHD.mT, offs=end_N)
    hidden_PH = F.gelu(up_PH) if gate_NHD is None else F.silu(F.grouped_mm(x_PD, gate_NHD.mT, offs=end_N)) * up_PH
    real_P = routing.weight_P * (routing.expert_P < number)
    # before down, where padding rows become exact zeros in the same pass
    hidden_PH = (hidden_PH * real_P[order_P, None]).to(dtype)
    y_PD = F.grouped_mm(hidden_PH, down_NDH.mT, offs=end_N)
    y_TD: Tensor = _Combine.apply(y_PD, tokens, routing.token_P, order_P, inverse_P, routing.slots)  # type: ignore[no-untyped-call]
    return y_TD


def _spread(x_TD: Tensor, token_P: Tensor, order_P: Tensor) -> Tensor:
    return x_TD[token_P[order_P]]


def _combine(y_PD: Tensor, tokens: int, token_P: Tensor, order_P: Tensor, inverse_P: Tensor, slots: int) -> Tensor:
    if slots:
        # a sum of K rows in a fixed order, without atomics: the same bits every time
        return y_PD[inverse_P].view(tokens, slots, -1).sum(1, dtype=torch.float32).to(y_PD.dtype)
    sum_TD = y_PD.new_zeros(tokens, y_PD.shape[1], dtype=torch.float32)
    return sum_TD.index_add_(0, token_P[order_P], y_PD.float()).to(y_PD.dtype)


class _Spread(torch.autograd.Function):
    """Each pair's token, in expert order. The backward is `_Combine`: no scatter with atomics where slots are known."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_P: Tensor, order_P: Tensor, inverse_P: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(token_P, order_P, inverse_P)
        ctx.slots, ctx.tokens = slots, x_TD.shape[0]
        return _spread(x_TD, token_P, order_P)

    @staticmethod
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor | None, ...]:
        token_P, order_P, inverse_P = ctx.saved_tensors
        return _combine(dx_PD, ctx.tokens, token_P, order_P, inverse_P, ctx.slots), None, None, None, None


class _Combine(torch.autograd.Function):
    """The sum of each token's rows; the backward is `_Spread`."""

    @staticmethod
    def forward(
        ctx: Any, y_PD: Tensor, tokens: int, token_P: Tensor, order_P: Tensor, inverse_P: Tensor, slots: int
    ) -> Tensor:
        ctx.save_for_backward(token_P, order_P)
        return _combine(y_PD, tokens, token_P, order_P, inverse_P, slots)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(dy_TD, *ctx.saved_tensors), None, None, None, None, None
