"""Factors that a config's own sizes switch off."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

from mue.layouts.transformers.scalings import scalings
from support.stock_models import tiny


def test_minicpm_divides_by_its_sizes() -> None:
    config = tiny("minicpm3")
    neutral = {s.attribute: s.neutral for s in scalings(config) if s.active}
    assert neutral["scale_depth"] == pytest.approx(config.num_hidden_layers**0.5)
    assert neutral["dim_model_base"] == config.hidden_size
    config.scale_depth, config.dim_model_base = 1.41421, config.hidden_size  # as the message prints them
    assert not {"scale_depth", "dim_model_base"} & {s.attribute for s in scalings(config) if s.active}
    assert {s.neutral for s in scalings(tiny("granite", residual_multiplier=0.5)) if s.active} == {1.0}
