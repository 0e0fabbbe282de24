"""What this machine offers to the MoE layer, which backends are active, why others are not, and how fast each is."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from mue.kernels import build, library
from mue.kernels.library import bf16_instructions
from mue.lab.doctor.timing import Bench, Case, draw_routing, measure, median_ratio
from mue.moe import ExpertWeights
from mue.moe.experts import BACKENDS, REFUSALS, choose


def make_report(seconds: float = 5.0) -> dict[str, Any]:
    """The whole report as data, in the formats that ``mue doctor --json`` prints.

    Args:
        seconds: how long to measure, both dtypes together.

    Returns:
        ``machine`` (:func:`machine_facts`), ``backends`` (:func:`backend_states`) and ``ratio``
        (:func:`backend_ratios`).
    """
    return {"machine": machine_facts(), "backends": backend_states(), "ratio": backend_ratios(seconds)}


def machine_facts() -> dict[str, Any]:
    """What there is: processor and its instructions, cores, torch, compiler, GPU."""
    capabilities = torch.cpu.get_capabilities()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": capabilities.get("cpu_name") or platform.machine(),
        "cores": os.cpu_count(),
        "others at work": _other_load(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": bf16_instructions(),
        "matrix unit (AMX)": bool(capabilities.get("amx_bf16")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": build.compiler(),
        "GPU": gpu,
    }


def _other_load() -> str | None:
    """What to think of the ratios where other programs take a quarter of the cores or more; else None.

    Paired rounds cancel a slower machine, but not OpenMP threads that spin while they wait for a core: a product was 20
    times slower once (docs/LOG.md, "Speed on two cores").
    """
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    return None if load < cores / 4 else f"{load:.1f} on {cores} cores in the last minute: do not trust the ratios"


def backend_states() -> dict[str, str]:
    """Every backend of :func:`mue.moe.experts.experts`: active, ready, or why not, on a small input. Builds nothing."""
    states = {}
    small = ExpertWeights(*(torch.zeros(1, 16, 16) for _ in range(3)))  # widths that every backend's alignment allows
    for name in BACKENDS:
        device = "cuda" if name == "grouped_mm" and torch.cuda.is_available() else "cpu"
        x = torch.zeros(1, 16, device=device)
        dtype = torch.bfloat16 if name == "grouped_mm" else torch.float32
        reason = REFUSALS[name](x, small, dtype) if name in REFUSALS else None
        if reason is not None:
            states[name] = f"not active: {reason}"
        elif choose(x, small, dtype) == name:
            states[name] = f'active on {device}: "auto" takes it'
        else:
            states[name] = _PASSIVE[name]
    if library.loaded() is not None:
        states["native"] += f"; bf16 products go through {library.why_engine()}; {build.find()}"
    return states


# Of the backends that could compute here, those that "auto" leaves alone.
_PASSIVE = {
    "grouped_mm": "not active: there is no CUDA device (on a CPU it runs, slowly, by name)",
    "portable": "ready: taken where no other backend can",
    "native": "ready: taken by name",
    "reference": "ready: the oracle of the tests",
}


def backend_ratios(seconds: float) -> dict[str, dict[str, float]]:
    """dtype → backend → time over that of an eager dense FFN of equal active width, 2,048 tokens d128 h128 N16 a4."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(128, 128, 16, 4, dtype)  # the smallest cell of docs/performance.md, so that one can compare
        bench = Bench(case)
        names = [name for name in BACKENDS if name != "native" or library.loaded() is not None]
        steps = {"dense": bench.dense(), **{name: bench.backend(name) for name in names}}
        times = measure(steps, lambda case=case: draw_routing(case, "fresh", generator), seconds / 2, least=1)  # type: ignore[misc]
        found[case.dtype_name] = {name: round(median_ratio(times[name], times["dense"]), 2) for name in names}
    return found


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{name:<20}{_as_text(value)}" for name, value in report["machine"].items()]
    lines += ["", "MoE backends"]
    lines += [f"  {name:<12}{state}" for name, state in report["backends"].items()]
    dtypes = list(report["ratio"])
    lines += [
        "",
        "forward + backward against an eager dense FFN of equal active width (2,048 tokens, d128 h128 N16 a4)",
    ]
    lines += [f"  {'':<12}" + "".join(f"{dtype:>10}" for dtype in dtypes)]
    for name in report["ratio"][dtypes[0]]:
        lines.append(f"  {name:<12}" + "".join(f"{report['ratio'][dtype][name]:>10.2f}" for dtype in dtypes))
    return "\n".join(lines)


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
