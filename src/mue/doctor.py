"""What this machine offers to the MoE layer, which backends are active, why others are not, and how fast each is."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe import ExpertWeights, Routing, experts, native
from mue.moe.experts import BACKENDS, REFUSALS, choose
from mue.moe.native import build

Step = Callable[[Routing], None]


@dataclass(frozen=True)
class Case:
    """A MoE layer's expert compute: width, expert width, experts, active experts, tokens, and the dtype of autocast."""

    width: int
    inner: int
    number: int
    active: int
    dtype: torch.dtype = torch.float32
    tokens: int = 2048

    @property
    def name(self) -> str:
        """`d128h128N16a4`."""
        return f"d{self.width}h{self.inner}N{self.number}a{self.active}"

    @property
    def dtype_name(self) -> str:
        """`float32`."""
        return str(self.dtype).removeprefix("torch.")


def draw_routing(case: Case, kind: str, generator: torch.Generator) -> Routing:
    """A routing as a new one comes every step: "fresh" is balanced in expectation, "zipf" prefers expert i as 1/(i+1)."""
    uniform_TN = torch.rand(case.tokens, case.number, generator=generator).clamp(1e-9, 1 - 1e-7)
    score_TN = -torch.log(-torch.log(uniform_TN))  # Gumbel noise: top-k of it draws without replacement
    if kind == "zipf":
        score_TN -= torch.log(torch.arange(1, case.number + 1))
    expert_TK = score_TN.topk(case.active, dim=1).indices
    weight_TK = torch.rand(case.tokens, case.active, generator=generator).softmax(1) * case.active
    return Routing.from_topk(expert_TK, weight_TK.requires_grad_(), case.number, route_scale=case.active, stats=False)


class Bench:
    """The inputs of a case, and steps (forward and backward, gradients of everything) of whatever computes on them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x_TD = torch.randn(case.tokens, case.width, requires_grad=True)
        self.dy_TD = torch.randn(case.tokens, case.width)
        wide, tall = (case.number, case.inner, case.width), (case.number, case.width, case.inner)
        self.routed = [self.matrix(*wide), self.matrix(*wide), self.matrix(*tall)]

    def matrix(self, *shape: int) -> Tensor:
        """A weight of the usual size."""
        return torch.randn(shape).div_(shape[-1] ** 0.5).requires_grad_()

    def step(self, forward: Callable[[Routing], Tensor], weights: Iterable[Tensor]) -> Step:
        """One step of `forward`, under autocast where the case's dtype is not float32."""
        weights = [self.x_TD, *weights]

        def run(routing: Routing) -> None:
            for weight in weights:
                weight.grad = None
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.case.dtype == torch.bfloat16):
                y_TD = forward(routing)
            torch.autograd.backward(y_TD, self.dy_TD.to(y_TD.dtype))

        return run

    def dense(self) -> Step:
        """An eager SwiGLU FFN of equal active width: what everything is compared with."""
        width, wide = self.case.width, self.case.active * self.case.inner
        gate, up, down = self.matrix(wide, width), self.matrix(wide, width), self.matrix(width, wide)

        def forward(_: Routing) -> Tensor:
            y_TD: Tensor = F.linear(F.silu(F.linear(self.x_TD, gate)) * F.linear(self.x_TD, up), down)
            return y_TD

        return self.step(forward, [gate, up, down])

    def backend(self, name: str) -> Step:
        """One of our backends."""
        return self.step(lambda r: experts(self.x_TD, r, ExpertWeights(*self.routed), backend=name), self.routed)


def measure(
    steps: dict[str, Step], routings: Callable[[], Routing], seconds: float, least: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of every step, by name: rounds in which all run once in random order, at least `least` rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(routings())
    end = time.perf_counter() + seconds
    while min(map(len, times.values())) < least or time.perf_counter() < end:
        for name in random.sample(list(steps), len(steps)):
            routing = routings()
            start = time.perf_counter()
            steps[name](routing)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def paired_ratio(times: list[float], base: list[float]) -> float:
    """The median over rounds of time / base: a busy machine slows both of a round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def machine() -> dict[str, Any]:
    """What there is: processor and its instructions, cores, torch, compiler, GPU."""
    facts = torch.cpu.get_capabilities()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": facts.get("cpu_name") or platform.machine(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": bool(facts.get("avx512_bf16") or facts.get("bf16")),
        "matrix unit (AMX)": bool(facts.get("amx_bf16")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": build.compiler(),
        "GPU": gpu,
    }


def backends() -> dict[str, str]:
    """Every backend with its state in words: active, or why not."""
    words = {}
    small = ExpertWeights(*(torch.zeros(1, 16, 16) for _ in range(3)))
    for name in BACKENDS:
        device = "cuda" if name == "grouped_mm" and torch.cuda.is_available() else "cpu"
        x = torch.zeros(1, 16, device=device)
        dtype = torch.bfloat16 if name == "grouped_mm" else torch.float32
        reason = REFUSALS[name](x, small, dtype) if name in REFUSALS else None
        if reason is not None:
            words[name] = f"not active: {reason}"
        elif choose(x, small, dtype) == name:
            words[name] = f'active on {device}: "auto" takes it'
        else:
            words[name] = _passive(name)
    if native.library() is not None:
        how = {"plain": "float32 inside the kernel", "matrix unit": "the matrix unit"}[native.engine()]
        words["native"] += f"; bf16 products go through {how}; {build.find()}"
    return words


def _passive(name: str) -> str:
    if name == "grouped_mm":
        return "not active: there is no CUDA device (on a CPU it runs, slowly, by name)"
    if name == "portable":
        return "ready: taken where no other backend can"
    return "ready: the oracle of the tests"


def ratios(seconds: float) -> dict[str, dict[str, float]]:
    """dtype -> backend -> time over that of an eager dense FFN of equal active width, 2,048 tokens d128 h128 N16 a4."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(128, 128, 16, 4, dtype)
        bench = Bench(case)
        names = [name for name in BACKENDS if name != "native" or native.library() is not None]
        steps = {"dense": bench.dense(), **{name: bench.backend(name) for name in names}}
        times = measure(steps, lambda case=case: draw_routing(case, "fresh", generator), seconds / 2)  # type: ignore[misc]
        found[case.dtype_name] = {name: round(paired_ratio(times[name], times["dense"]), 2) for name in names}
    return found


def examine(seconds: float = 5.0) -> dict[str, Any]:
    """The whole report as data."""
    return {"machine": machine(), "backends": backends(), "ratio": ratios(seconds)}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    told = [f"{name:<20}{'none' if value is None else _word(value)}" for name, value in report["machine"].items()]
    told += ["", "MoE backends"]
    told += [f"  {name:<12}{words}" for name, words in report["backends"].items()]
    dtypes = list(report["ratio"])
    told += ["", "forward + backward against an eager dense FFN of equal active width (2,048 tokens, d128 h128 N16 a4)"]
    told += [f"  {'':<12}" + "".join(f"{dtype:>10}" for dtype in dtypes)]
    for name in report["ratio"][dtypes[0]]:
        told.append(f"  {name:<12}" + "".join(f"{report['ratio'][dtype][name]:>10.2f}" for dtype in dtypes))
    return told


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
