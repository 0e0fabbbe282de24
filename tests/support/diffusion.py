"""Small diffusion transformers and images to train them on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import mue
from mue.lab.data import ImageSet
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.train.run import Run, Settings

IMAGE = mue.Image(size=8, channels=1, patch=2, classes=3)
BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, image=IMAGE)
MOE = mue.MoE.parse("8e2a1s", width=32, expert=16, layers=2, head_dim=16, image=IMAGE)
TUNED = mue.HParams(lr=0.01, weight_decay=0.02, init_std=0.1, clip=1.0)


def images(count: int = 60, held_out: int = 12, seed: int = 0) -> ImageSet:
    """Stripes across, stripes down, and squares, each with a little noise."""
    draw = np.random.default_rng(seed)
    label = np.arange(count + held_out) % 3
    stripe = np.where(np.arange(8) % 4 < 2, 220, 30)
    kinds = np.stack([np.tile(stripe, (8, 1)), np.tile(stripe, (8, 1)).T, np.pad(np.full((4, 4), 220), 2)])
    pixel = np.clip(kinds[label] + draw.integers(-20, 20, (len(label), 8, 8)), 0, 255).astype(np.uint8)[:, None]
    names = ("across", "down", "square")
    return ImageSet(pixel[:count], label[:count], pixel[count:], label[count:], names, hash=f"{seed:064x}")


def plan_of(target: mue.Dense | mue.MoE = MOE, steps: int = 20, **options: Any) -> mue.Plan:
    """8 images a step."""
    training = mue.Training(8 * IMAGE.tokens, steps)
    return mue.transfer(BASE, target, TUNED, base_training=training, training=training, **options)


def run_of(corpus: ImageSet, target: mue.Dense | mue.MoE = MOE, steps: int = 20, **settings: Any) -> Run:
    known = {"task": "diffusion", "eval_sequences": 6, "log_every": 2, **settings}
    return Run(plan_of(target, steps), Settings(**known), {**corpus.describe(), "source": {}})


def model_of(plan: mue.Plan, seed: int = 0, *, awake: float = 0.0) -> DiffusionModel:
    """The planned model at its init; ``awake``: with modulations drawn at this std, so that its branches are heard."""
    model = DiffusionModel(plan.target, plan.multipliers)
    plan.init_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modulation" in name and awake:
                p.normal_(std=awake, generator=generator)
    return model


def batch_of(images: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x_t, times, classes (one of them none), velocities."""
    draw = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(images, 1, 8, 8, generator=draw, dtype=dtype) for _ in range(2))
    label = torch.randint(IMAGE.classes + 1, (images,), generator=draw)
    return x, torch.rand(images, generator=draw, dtype=dtype), label, v
