"""What a training step is made of, for one model and for many at once: optimizer, precision, objective, compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mue.lab.models.output import Output
from mue.lab.models.stacked_moe import StackedMoE
from mue.lab.train.run import Settings
from mue.model.apply import groups_of
from mue.model.muon import Muon
from mue.moe import MoELayer
from mue.plan.plan import PlanData


def device_named(name: str) -> torch.device:
    """A device by torch's name for it (``cpu``, ``cuda:1``).

    Raises:
        ValueError: torch has no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # what torch raises depends on how it was built
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ValueError("the device 'meta' holds shapes only, and nothing can be trained on it")
    return device


def autocast(device: torch.device, settings: Settings) -> Any:
    """The precision that a run asks for, as a context; under autocast weights, gradients and moments stay float32.

    Args:
        device: that the forward pass runs on.
    """
    return torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()


def uncompiled(compiled: bool) -> Any:
    """Validation, as a context: compiled blocks run as they are written, since nothing is gained from compiling them once more for it."""
    # Not for models that are not compiled: naming torch.compiler's stance alone costs seconds of imports.
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def planned_optimizer(plan: PlanData, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (1711.05101) or Muon, with the plan's settings for each group of roles, and the peak beside each rate.

    The schedule's factor is multiplied into the peak anew at every step.
    """
    groups = [{"params": g["params"], "lr": g["lr"], "initial_lr": g["lr"], **g} for g in groups_of(plan, model)]
    if plan.tuned.optimizer == "muon":
        return Muon(groups)
    # Fused, since its passes over memory are then one: 3 ms of a step of 120 (docs/performance.md).
    return torch.optim.AdamW(groups, fused=True)


def objective(output: Output, coefficients: Mapping[str, float | Tensor]) -> Tensor:
    """What is minimised: the loss, plus each auxiliary loss times its coefficient.

    Args:
        output: of the forward pass.
        coefficients: by the names of ``output.losses``; of V stacked variants (V,) each. A loss that is not among them is one that a
            router of somebody's own brought, and counts as it is.

    Returns:
        A scalar; of stacked variants (V,).
    """
    assert output.loss is not None
    total = output.loss
    for name, coefficient in coefficients.items():
        if name in output.losses:
            total = total + coefficient * output.losses[name]
    for name, loss in output.losses.items():
        if name not in coefficients:
            total = total + loss
    return total


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The blocks with experts of a model, in the order of its forward pass."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block without experts in place: whatever stands in a ``ModuleList``.

    Equal blocks share their code, so that this takes a fraction of the time of compiling the whole model, and gives the same speed
    (measured at d64–d128, L8: 15 s instead of 50–90). Blocks with experts stay: routing depends on the data.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            if not any(isinstance(module, MoELayer | StackedMoE) for module in block.modules()):
                block.compile()
