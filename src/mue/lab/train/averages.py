"""Averages of a run's weights over its steps (EMA), several decay rates from one run, so that the best is chosen after it.

    w ← w + (1 − β_t)·(θ − w)        β_t = min(β, (1 + t)/(10 + t))

The ramp forgets the init in a short run (as in TensorFlow's ``ExponentialMovingAverage``). Diffusion models are sampled with averages:
DiT and DiT-MoE with β = 0.9999 (2212.09748, 2407.11633).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mue.lab.train.checkpoint import save_weights
from mue.lab.train.run import AVERAGE_FILES


def ema_file(decay: float) -> str:
    """Where the average of a run's weights with this decay lies in its folder, where weights are kept."""
    # repr, not :g, which rounds to six digits: 0.9999999 would be 1
    return AVERAGE_FILES.replace("*", repr(decay))


class Averages:
    """The averages of a model's trained parameters, in their own types, on their devices.

    Args:
        model: whose. decays: β of each average.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.of = {decay: {n: p.detach().clone() for n, p in self.parameters.items()} for decay in decays}

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """After an optimizer step.

        Args:
            step: its number, from 1.
        """
        weights = [p.detach() for p in self.parameters.values()]
        for decay, average in self.of.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - min(decay, (1 + step) / (10 + step)))

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, for a checkpoint: ``0.999/blocks.0.ffn.up.weight``."""
        return {f"{decay!r}/{name}": t for decay, average in self.of.items() for name, t in average.items()}

    @contextmanager
    def in_place(self, decay: float) -> Iterator[None]:
        """The model has an average for its weights, as a context."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.of[decay])
        try:
            yield
        finally:
            self._put(kept)

    def result(self, validate: Callable[[], float]) -> dict[str, Any]:
        """What a run's result has of them, ``ema_val_loss`` by decay; empty without any.

        Args:
            validate: the loss of the model as it is, here with each average for its weights.
        """
        found: dict[str, float | None] = {}
        for decay in self.of:
            with self.in_place(decay):
                loss = validate()
            found[repr(decay)] = loss if math.isfinite(loss) else None
        return {"ema_val_loss": found} if found else {}

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write each average as weights of its own, ``ema-0.999.safetensors``, with the model's buffers as they are.

        Args:
            folder: of the run. metadata: as of :func:`mue.lab.train.checkpoint.save_weights`.
        """
        for decay in self.of:
            with self.in_place(decay):
                save_weights(folder / ema_file(decay), self.model, metadata)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
