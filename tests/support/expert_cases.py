"""Routings, weights and a run of one backend, for the tests of expert compute."""

from __future__ import annotations

import torch
from torch import Tensor

from mue.moe import ExpertWeights, Routing, experts

FAST = ["portable", "native"]
EXACT = ["reference", *FAST]  # grouped_mm has no float64


def make_weights(number: int, width: int, inner: int, dtype: torch.dtype, gated: bool = True) -> list[Tensor | None]:
    """Gate (None without one), up and down of every expert, of the size of weights at init."""

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_()

    gate = matrix(number, inner, width) if gated else None
    return [gate, matrix(number, inner, width), matrix(number, width, inner)]


def make_routing(kind: str, tokens: int, number: int, slots: int, dtype: torch.dtype = torch.float64) -> Routing:
    """A random routing of one kind; its weight_P is a leaf."""
    if kind == "choice":  # expert choice: every expert takes the same number of tokens
        capacity = max(1, tokens * slots // number) if tokens else 0
        token_P = torch.stack([torch.randperm(tokens)[:capacity] for _ in range(number)]).reshape(-1)
        expert_P = torch.arange(number).repeat_interleave(min(capacity, tokens))
        weight_P = torch.rand(len(token_P), dtype=dtype, requires_grad=True)
        return Routing(token_P, expert_P, weight_P, tokens, number, slots=0)
    score_TN = torch.rand(tokens, number)
    if kind == "one":  # everything to the last experts
        score_TN += torch.arange(number)
    expert_TK = score_TN.argsort(dim=1, descending=True)[:, :slots]
    weight_TK = torch.rand(tokens, slots, dtype=dtype)
    if kind == "ragged":
        padding_TK = torch.rand(tokens, slots) < 0.4
        expert_TK, weight_TK = expert_TK.masked_fill(padding_TK, number), weight_TK.masked_fill(padding_TK, 0.0)
    weight_P = weight_TK.reshape(-1).requires_grad_()
    token_P = torch.arange(tokens).repeat_interleave(slots)
    return Routing(token_P, expert_TK.reshape(-1), weight_P, tokens, number, slots)


def run(
    backend: str, x_TD: Tensor, routing: Routing, weights: list[Tensor | None], dy_TD: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Output and the gradients of x, weight_P and the weights."""
    y_TD = experts(x_TD, routing, ExpertWeights(*weights), backend=backend)
    leaves = [x_TD, routing.weight_P, *(weight for weight in weights if weight is not None)]
    gradients = torch.autograd.grad(y_TD, leaves, dy_TD.to(y_TD.dtype), allow_unused=True)
    return y_TD.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def assert_close(left: Tensor, right: Tensor, tolerance: float) -> None:
    """Relative to the largest value: a sum's rounding is of the size of its terms."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    if left.numel():
        error = (left - right).abs().max() / right.abs().max().clamp(min=1e-30)
        assert error <= tolerance, float(error)
