"""Tiny models of transformers families, planned and trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import mue
from mue.layouts.inspect import inspect
from mue.layouts.transformers.configs import build, default_config
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.tiny import shrink

TUNED = mue.HParams(lr=3e-3, weight_decay=0.1, init_std=0.05, eps=1e-8)
STEPS = 100


def tiny(family: str, **settings: Any) -> Any:
    """The config of a family, of two layers and as small as it can be, with other settings where wished."""
    config = shrink(default_config(family), 2, family_of(family).tiny)
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 1  # one dense layer, one with experts
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def stock(config: Any) -> nn.Module:
    """The family's own model in float64, so that only mistakes are larger than rounding."""
    torch.manual_seed(0)
    model = build(copy.deepcopy(config)).double()
    model.set_experts_implementation("eager")  # type: ignore[operator]  # grouped products have no float64
    return model


def planned(config: Any, head_dim: int = 16, moments: tuple[float, float] | None = None) -> mue.Plan:
    """A plan for the config's shape from a small dense base; ``moments``: of gates that do not sum to one."""
    shape = inspect(config, gate_moments=moments).shape
    assert shape is not None, inspect(config).no_shape
    base = mue.Dense(width=32, ffn=32, layers=1, head_dim=head_dim)
    return mue.transfer(base, shape, TUNED)


def train(model: nn.Module, groups: list[dict[str, Any]], steps: int = STEPS) -> None:
    """AdamW on the same random tokens for every model."""
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(3, 90, (2, 12), generator=generator)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
