"""Text from a trained language model, to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mue.lab.train.run import Run, Store
from mue.lab.train.task import task_of
from mue.model.apply import init_


def trained_model(run: Run, store: Store) -> nn.Module | None:
    """The model of a finished run that kept its weights.

    Returns:
        The model in eval mode; None where the run's folder has no ``model.safetensors``.
    """
    path: Path = store.folder(run.key) / "model.safetensors"
    if not path.exists():
        return None
    model = task_of(run.settings).build(run.plan, run.settings)
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def untrained_model(run: Run) -> nn.Module:
    """The model of a run before its first step."""
    model = task_of(run.settings).build(run.plan, run.settings)
    init_(run.plan, model, run.settings.seed)
    return model.eval()


@torch.no_grad()
def sample_bytes(
    model: nn.Module, prompt: bytes, length: int, *, window: int, temperature: float = 0.7, seed: int = 0
) -> bytes:
    """Draw a continuation, byte by byte, from a model whose tokens are bytes.

    Args:
        prompt: what it goes on from. length: how many bytes to draw. window: the longest sequence it was trained on.
        temperature: below 1 the likelier bytes are drawn more often. seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        logits_V = model(torch.tensor([tokens[-window:]])).logits[0, -1].float()
        chances_V = torch.softmax(logits_V / temperature, dim=-1)
        tokens.append(int(torch.multinomial(chances_V, 1, generator=generator)))
    return bytes(tokens[len(prompt) :])
