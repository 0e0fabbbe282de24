"""The two packages of Muon that no index has, stood in for: ``emerging_optimizers`` 0.1 (Megatron-Core's) and ``dion`` (OLMo-core's).

Both are on GitHub alone. What stacks read of them is here as their sources have it: the arguments, the order of a step and the scales.
The iteration is an exact polar factor. ``make stacks`` feeds the files to the stacks' own builders, which call these.
"""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import torch
from torch import Tensor


def polar(x: Tensor) -> Tensor:
    """U·Vᵀ by SVD."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def get_muon_scale_factor(out: int, fan_in: int, mode: str = "spectral") -> float:
    """emerging_optimizers' three scales, by its names."""
    scales = {"shape_scaling": max(1.0, out / fan_in), "spectral": max(out, fan_in), "unit_rms_norm": out / fan_in}
    return math.sqrt(scales[mode])


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """As emerging_optimizers 0.1 has it: decay, average, step ahead, what a subclass makes of it, step."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum_beta: float,
        *,
        use_nesterov: bool,
        weight_decay: float,
        weight_decay_method: str,
        fp32_matmul_prec: str,
        scaled_orthogonalize_fn: Any,
    ) -> None:
        assert weight_decay_method == "decoupled"
        self.use_nesterov, self.scaled_orthogonalize_fn = use_nesterov, scaled_orthogonalize_fn
        super().__init__(params, {"lr": lr, "momentum_beta": momentum_beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                average.lerp_(p.grad, 1 - group["momentum_beta"])
                ahead = p.grad.lerp(average, group["momentum_beta"]) if self.use_nesterov else average
                p.add_(self.orthogonalize(p, ahead), alpha=-group["lr"])  # type: ignore[attr-defined]


class DionMuon(torch.optim.Optimizer):
    """dion.Muon: the arguments that stacks give it, kept as groups; ``algorithm`` says who moves one."""

    def __init__(
        self,
        params: Any,
        distributed_mesh: Any = None,
        lr: float = 0.01,
        mu: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        cautious_wd: bool = False,
        epsilon: float = 1e-8,
        nesterov: bool = False,
        adjust_lr: str | None = "spectral_norm",
        flatten: bool = False,
        use_triton: bool = False,
    ) -> None:
        assert adjust_lr in ("spectral_norm", "rms_norm", None)
        own = {
            "lr": lr,
            "mu": mu,
            "beta1": betas[0],
            "beta2": betas[1],
            "weight_decay": weight_decay,
            "algorithm": "muon",
        }
        more = {"epsilon": epsilon, "nesterov": nesterov, "adjust_lr": adjust_lr, "cautious_wd": cautious_wd}
        super().__init__(params, {**own, **more, "flatten": flatten})


def stand_in() -> None:
    """Put both where imports find them, before the stacks look."""
    made = {
        "emerging_optimizers": {},
        "emerging_optimizers.orthogonalized_optimizers": {
            "OrthogonalizedOptimizer": OrthogonalizedOptimizer,
            "get_muon_scale_factor": get_muon_scale_factor,
        },
        "emerging_optimizers.orthogonalized_optimizers.muon_utils": {"newton_schulz_tp": lambda x, **_: polar(x)},
        "dion": {"Muon": DionMuon, "NorMuon": DionMuon},
    }
    for name, values in made.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        sys.modules.setdefault(name, module)
