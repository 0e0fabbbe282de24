"""A config shrunk to a model of a few tensors."""

from __future__ import annotations

from mue.layouts.transformers.tiny import shrink
from support.layout_models import Config


def test_shrinking_keeps_one_layer_of_each_kind() -> None:
    class Listed(Config):
        def __init__(self) -> None:
            super().__init__(hidden_size=4096, num_hidden_layers=6, num_attention_heads=32)
            self.layer_types = ["a", "a", "b", "a", "a", "b"]

    small = shrink(Listed(), 1)
    assert (small.hidden_size, small.num_hidden_layers, small.layer_types) == (64, 2, ["a", "b"])
