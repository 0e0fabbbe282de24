"""Measuring the expert compute against a dense feed-forward network: the inputs, the rounds, the statistics.

Shared by `mue doctor` and `benchmarks/moe_layer.py`. Shape suffixes: T tokens, K active experts, N experts, D width.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts
from mue.moe.routing import Routing

Step = Callable[[Routing], None]
Input = TypeVar("Input")


@dataclass(frozen=True)
class Case:
    """Expert compute to be measured.

    Attributes:
        width: D. inner: an expert's. number: N, of experts. active: K, of a token. tokens: T, of a step.
        dtype: autocast's.
    """

    width: int
    inner: int
    number: int
    active: int
    dtype: torch.dtype = torch.float32
    tokens: int = 2048
    device: str = "cpu"

    @property
    def shape(self) -> str:
        """`d128h128N16a4`."""
        return f"d{self.width}h{self.inner}N{self.number}a{self.active}"

    @property
    def dtype_name(self) -> str:
        """`float32`."""
        return str(self.dtype).removeprefix("torch.")


def draw_routing(case: Case, kind: str, generator: torch.Generator) -> Routing:
    """Draw a routing, as new as every step's: one that repeats would leave its rows in the cache.

    Args:
        kind: "fresh" is balanced in expectation, "zipf" prefers expert i as 1/(i+1).
    """
    uniform_TN = torch.rand(case.tokens, case.number, generator=generator).clamp(1e-9, 1 - 1e-7)
    score_TN = -torch.log(-torch.log(uniform_TN))  # Gumbel noise: top-k of it draws without replacement
    if kind == "zipf":
        score_TN -= torch.log(torch.arange(1, case.number + 1))
    expert_TK = score_TN.topk(case.active, dim=1).indices.to(case.device)
    weight_TK = torch.rand(case.tokens, case.active, generator=generator).softmax(1).mul_(case.active)
    weight_TK = weight_TK.to(case.device).requires_grad_()
    return Routing.from_topk(expert_TK, weight_TK, case.number, route_scale=case.active, stats=False)


class Bench:
    """The inputs of a case, and steps (forward, and backward to everything) of whatever computes on them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x_TD = torch.randn(case.tokens, case.width, device=case.device, requires_grad=True)
        self.dy_TD = torch.randn(case.tokens, case.width, device=case.device)
        wide, tall = (case.number, case.inner, case.width), (case.number, case.width, case.inner)
        self.routed = [self.matrix(*wide), self.matrix(*wide), self.matrix(*tall)]

    def matrix(self, *shape: int) -> Tensor:
        """A weight of the usual size."""
        return torch.randn(shape, device=self.case.device).div_(shape[-1] ** 0.5).requires_grad_()

    def step(self, forward: Callable[[Routing], Tensor], weights: Iterable[Tensor]) -> Step:
        """One step of `forward`, under autocast where the case's dtype is not float32.

        Args:
            forward: from a routing to y (T, D). weights: whose gradients it computes, beside x's and the routing's.
        """
        leaves, dtype = [self.x_TD, *weights], self.case.dtype

        def run(routing: Routing) -> None:
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast(self.case.device, dtype=dtype, enabled=dtype != torch.float32):
                y_TD = forward(routing)
            torch.autograd.backward(y_TD, self.dy_TD.to(y_TD.dtype))
            if self.case.device == "cuda":
                torch.cuda.synchronize()

        return run

    def dense(self) -> Step:
        """An eager SwiGLU FFN of equal active width: what everything is compared with."""
        width, wide = self.case.width, self.case.active * self.case.inner
        gate, up, down = self.matrix(wide, width), self.matrix(wide, width), self.matrix(width, wide)

        def forward(_: Routing) -> Tensor:
            return F.linear(F.silu(F.linear(self.x_TD, gate)) * F.linear(self.x_TD, up), down)

        return self.step(forward, [gate, up, down])

    def backend(self, name: str) -> Step:
        """One of our backends."""
        return self.step(lambda r: experts(self.x_TD, r, ExpertWeights(*self.routed), backend=name), self.routed)


def measure(
    steps: Mapping[str, Callable[[Input], object]], inputs: Callable[[], Input], seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Time steps against each other in rounds: in each, every step runs once on a new input, in random order.

    All get the same share of the time. A slow step so takes part in fewer rounds, the first ones: `times[a][i]` and
    `times[b][i]` are of the same round, which is what `ratios` needs.

    Args:
        steps: by name, each a function of an input. inputs: makes one.
        seconds: in all. least: rounds of the slowest step.

    Returns:
        Milliseconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(inputs())  # first calls allocate, choose algorithms and compile
    share = 1e3 * seconds / len(steps)
    while left := [name for name, took in times.items() if len(took) < least or sum(took) < share]:
        for name in random.sample(left, len(left)):
            given = inputs()
            start = time.perf_counter()
            steps[name](given)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """time / base round by round, sorted: a busy machine slows both of a round.

    Args:
        times, base: milliseconds of the same rounds, the longer one's last ones left out.
    """
    return sorted(t / b for t, b in zip(times, base, strict=False))


def upper_bound(sample: Sequence[float]) -> float:
    """A one-sided 95 % bound on the median of a sorted sample, from its order alone; the largest value of a small one.

    How many values lie below the median is binomial (n, ½): 1.645 of its standard deviations √n/2 above n/2.
    """
    count = len(sample)
    return sample[min(count - 1, math.ceil(count / 2 + 1.645 * math.sqrt(count) / 2))]


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(times, base))
