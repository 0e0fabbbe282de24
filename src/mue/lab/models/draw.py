"""Images drawn from a diffusion model, each a function of its class and its seed alone.

Shape suffixes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mue.lab.data.images.scale import to_bytes
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.models.flow import follow, guided
from mue.lab.models.parts import routers_in
from mue.lab.models.sampling import Sampling

_AT_ONCE = 256  # images


@torch.no_grad()
def draw(
    model: DiffusionModel, classes: Sequence[int], seeds: Sequence[int], way: Sampling | None = None
) -> npt.NDArray[np.uint8]:
    """Draw an image for each class and seed.

    Args:
        model: in eval mode. classes: of each image, places among the model's. seeds: of each image's noise; the same seed is the same
            noise, whatever the class.

    Returns:
        Pixels (N, C, H, W) as bytes.

    Raises:
        ValueError: the images are not finite, as of a run that diverged; or a router looks at the batch, so that an image would depend on
            what is drawn beside it.
    """
    if reasons := sorted({router.reads_batch for router in routers_in(model)} - {""}):
        raise ValueError(f"an image's experts would depend on what is drawn beside it: {reasons[0]}")
    way, place = way or Sampling(), next(model.parameters()).device
    parts = []
    for i in range(0, len(classes), _AT_ONCE):
        noise = torch.stack([noise_of(model, seed) for seed in seeds[i : i + _AT_ONCE]]).to(place)
        class_N = torch.tensor(classes[i : i + _AT_ONCE], device=place)
        parts.append(follow(guided(model, class_N, way.guidance), noise, way.steps, way.sampler).cpu())
    images = torch.cat(parts)
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the model's velocity is not finite, so that nothing can be drawn: its run diverged")
    return to_bytes(images)


def noise_of(model: DiffusionModel, seed: int) -> Tensor:
    """The noise (C, H, W) of a seed."""
    image = model.image
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(image.channels, image.size, image.size, generator=generator)
