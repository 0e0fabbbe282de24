"""What a diffusion model does at fixed times: its loss on held-out images, and where its experts' tokens come from.

Shape suffixes: B images, T patches of an image, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mue.lab.models.diffusion import DiffusionModel
from mue.moe import Routing

Batch = tuple[Tensor, ...]


@torch.no_grad()
def at_times(model: DiffusionModel, batches: Sequence[Batch]) -> dict[str, Any]:
    """Losses and loads by time, JSON-ready.

    Args:
        model: in eval mode. batches: one for each time, (x_t, t, classes, velocities) on the model's device; the same images with the same noise
            in all of them, so that times and models are compared in pairs.

    Returns:
        ``times``; ``losses``, of each time those of each image; and of each block with experts ``by_time``, each expert's share of
        the pairs at each time, and ``by_place``, the same of each patch over all times.
    """
    out: dict[str, Any] = {"times": [], "losses": [], "by_time": [], "by_place": []}
    loads = []
    for x_BCHW, time_B, class_B, velocity_BCHW in batches:
        found = model(x_BCHW, time_B, class_B)
        out["times"].append(float(time_B[0]))
        out["losses"].append(_short((found.logits.float() - velocity_BCHW).square().flatten(1).mean(1)))
        loads.append([_load(routing, model.image.tokens) for routing in found.routings])
    for layer_TN in zip(*loads, strict=True):  # of every time
        out["by_time"].append([_short(_shares(load_TN.sum(0))) for load_TN in layer_TN])
        out["by_place"].append([_short(row) for row in _shares(torch.stack(layer_TN).sum(0))])
    return out


def _load(routing: Routing, patches: int) -> Tensor:
    """(T, N) pairs of each patch's place with each expert, over a batch's images; padding counts nowhere."""
    N = routing.num_experts
    real = routing.expert_P < N
    pair = (routing.token_P[real] % patches) * N + routing.expert_P[real]
    return torch.bincount(pair, minlength=patches * N).view(patches, N).double().cpu()


def _shares(load: Tensor) -> Tensor:
    """Over the last axis, of the pairs."""
    return load / load.sum(-1, keepdim=True).clamp(min=1)


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
