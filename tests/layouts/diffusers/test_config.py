"""Keywords of classes as configs with a width: as heads times their size, or as it is; and what follows from sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mue.layouts.diffusers.config import build_image, image_config


class Wide(nn.Module):
    def __init__(
        self, dim: int = 64, num_attention_heads: int = 4, axes_dims_rope: tuple[int, ...] = (4, 6, 6)
    ) -> None:
        super().__init__()
        self.built = {"width": dim, "axes": tuple(axes_dims_rope)}
        self.lines = nn.Linear(dim, dim)


class Heads(nn.Module):
    def __init__(
        self,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        cross_attention_dim: int = 64,
        num_layers: int = 2,
        num_single_layers: int = 1,
        own: tuple[int, ...] = (5, 6, 7),
    ) -> None:
        super().__init__()
        layers = num_layers + num_single_layers
        self.built = {
            "width": num_attention_heads * attention_head_dim,
            "cross": cross_attention_dim,
            "own": own[:layers],
        }


@pytest.mark.parametrize("kind", [Wide, Heads])
def test_the_width_is_found_and_what_follows_it_is_scaled(kind: Any) -> None:
    config = image_config(kind, {})
    assert config.hidden_size == 64
    config.hidden_size = 192
    with torch.device("meta"):
        built = build_image(kind, config).built
    assert built["width"] == 192
    if kind is Wide:
        assert sum(built["axes"]) == 192 // 4 and all(n % 2 == 0 for n in built["axes"])
    else:
        assert built["cross"] == 192


def test_what_each_block_has_for_itself_is_cut_to_the_blocks_there_are() -> None:
    config = image_config(Heads, {})
    config.num_layers = 1
    assert build_image(Heads, config).built["own"] == (5, 6)


def test_another_cross_attention_keeps_its_own_size() -> None:
    """The control: only what is as long as the width follows it."""
    config = image_config(Heads, {"cross_attention_dim": 48})
    config.hidden_size = 192
    assert build_image(Heads, config).built["cross"] == 48


def test_a_class_without_a_width_is_refused() -> None:
    class Neither(nn.Module):
        def __init__(self, layers: int = 2) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="Neither says its width neither as num_attention_heads"):
        image_config(Neither, {})
