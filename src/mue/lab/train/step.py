"""What a training step is made of, for one model and for many at once: precision, objective, compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mue.lab.models.language import LanguageModel, Output, TransformerBlock
from mue.lab.train.run import Settings


def autocast(device: torch.device, settings: Settings) -> Any:
    """The precision a run asks for, as a context."""
    return torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()


def uncompiled(compiled: bool) -> Any:
    """Validation, as a context: compiled blocks run as they are written, since nothing is gained from compiling them once more for it."""
    return (
        torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    )  # the name alone costs seconds of imports


def objective(output: Output, coefficients: Mapping[str, float | Tensor]) -> Tensor:
    """What is minimised: the loss and the auxiliary ones with their coefficients (of variants: one each)."""
    assert output.loss is not None
    total = output.loss
    for name, coefficient in coefficients.items():
        if name in output.losses:
            total = total + coefficient * output.losses[name]
    return total


def compile_blocks(model: LanguageModel) -> None:
    """Compile each dense block in place.

    Equal blocks share their code, so that this takes a fraction of the time of compiling the whole model, and gives the same speed
    (measured at d64–d128, L8: 15 s instead of 50–90). Blocks with experts stay: routing depends on the data.
    """
    for block in model.blocks:
        if isinstance(block, TransformerBlock) and block.moe is None:
            block.compile()
