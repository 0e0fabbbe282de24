"""What a model does at fixed times, against a count by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mue.lab.models.at_times import at_times
from mue.lab.tasks.diffusion import TIME_BINS, DiffusionTask, bin_times
from support.diffusion import BASE, images, model_of, plan_of, run_of


def test_losses_and_loads() -> None:
    corpus, model = images(), model_of(plan_of(), awake=0.3).eval()
    batches = DiffusionTask().batches(run_of(corpus), corpus).validation()
    found = at_times(model, batches)
    assert found["times"] == pytest.approx(bin_times()) and len(found["losses"]) == TIME_BINS
    with torch.no_grad():
        outputs = [model(*batch) for batch in batches]
    for own, output in zip(found["losses"], outputs, strict=True):
        assert len(own) == 6 and math.fsum(own) / 6 == pytest.approx(float(output.loss), rel=1e-4)
    layers, experts, patches = 2, 8, 16
    assert [len(found[name]) for name in ("by_time", "by_place")] == [layers, layers]
    for layer in range(layers):
        pairs = Counter[tuple[int, int, int]]()
        for time, output in enumerate(outputs):
            routing = output.routings[layer]
            for token, expert in zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True):
                pairs[time, token % patches, expert] += 1
        total = pairs.total() / TIME_BINS
        for time in range(TIME_BINS):
            wanted = [sum(n for (t, _, e), n in pairs.items() if (t, e) == (time, i)) / total for i in range(experts)]
            assert found["by_time"][layer][time] == pytest.approx(wanted, rel=1e-4)
        for place in range(patches):
            own = [sum(n for (_, p, e), n in pairs.items() if (p, e) == (place, i)) for i in range(experts)]
            assert found["by_place"][layer][place] == pytest.approx([n / sum(own) for n in own], rel=1e-4)


def test_a_dense_model_has_losses_alone() -> None:
    corpus = images()
    batches = DiffusionTask().batches(run_of(corpus, BASE), corpus).validation()
    found = at_times(model_of(plan_of(BASE)).eval(), batches)
    assert found["by_time"] == found["by_place"] == [] and len(found["losses"]) == TIME_BINS
