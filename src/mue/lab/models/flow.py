"""The rectified flow between images and noise (2209.03003): its identities, its times, and the ways to follow a velocity back to an image.

    x_t = (1 − t) · x_0 + t · ε        v = dx_t/dt = ε − x_0        x_0 = x_t − t · v        ε = x_t + (1 − t) · v

Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mue.lab.models.diffusion import DiffusionModel
from mue.util.errors import nearest, positive_int

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t (B,)) → dx_t/dt."""


def of_image(time_B: Tensor, like: Tensor) -> Tensor:
    """t of each image, shaped to multiply it."""
    return time_B[..., None, None, None].to(like.dtype)


def noised(image_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
    """x_t on the straight way from an image (t = 0) to noise (t = 1)."""
    return torch.lerp(image_BCHW, noise_BCHW, of_image(time_B, image_BCHW))


def velocity(image_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """v, the same all along the way."""
    return noise_BCHW - image_BCHW


def guided(model: DiffusionModel, class_B: Tensor, guidance: float) -> Velocity:
    """A model's velocity towards classes, with classifier-free guidance (2207.12598): v_∅ + w · (v_c − v_∅).

    Args:
        class_B: what each image is to be. guidance: w; 1 is the model's own velocity, and asks it once.
    """
    none_B = torch.full_like(class_B, model.unconditional)

    def field(x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        if guidance == 1.0:
            return model(x_BCHW, time_B, class_B).logits  # type: ignore[no-any-return]
        # both in one pass: of a model that `draw` accepts, a velocity does not depend on what else is in its batch
        both = model(x_BCHW.repeat(2, 1, 1, 1), time_B.repeat(2), torch.cat((class_B, none_B))).logits
        of_class, of_none = both.chunk(2)
        return torch.lerp(of_none, of_class, guidance)

    return field


def euler(field: Velocity, x_BCHW: Tensor, time_B: Tensor, step: float) -> Tensor:
    """One step of length ``step`` towards t = 0: error of order 1."""
    return x_BCHW - step * field(x_BCHW, time_B)


def heun(field: Velocity, x_BCHW: Tensor, time_B: Tensor, step: float) -> Tensor:
    """One step by the mean of the velocities at both its ends: error of order 2, for twice the passes."""
    here = field(x_BCHW, time_B)
    there = field(x_BCHW - step * here, time_B - step)
    return x_BCHW - step * (here + there) / 2


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor, float], Tensor]] = {"euler": euler, "heun": heun}


@torch.no_grad()
def follow(field: Velocity, noise_BCHW: Tensor, steps: int, sampler: str) -> Tensor:
    """Follow a velocity from noise at t = 1 to images at t = 0, in equal steps.

    Args:
        noise_BCHW: standard normal. steps: how many; DiT-MoE takes 50 (2407.11633). sampler: of :data:`SAMPLERS`.

    Raises:
        ValueError: an unknown sampler, or a number of steps below 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown{nearest(sampler, SAMPLERS)}")
    steps, x = positive_int("steps", steps), noise_BCHW
    for i in range(steps):
        time_B = torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)
        x = SAMPLERS[sampler](field, x, time_B, 1 / steps)
    return x
