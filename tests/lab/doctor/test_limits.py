"""What a step is held against: memory and peak, on steps whose own are known; what our backends keep for their backward."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from mue.lab.doctor import limits
from mue.lab.doctor.timing import Bench, Case, draw_routing


def test_what_is_kept_is_counted_once_and_without_parameters() -> None:
    x, given = torch.randn(1000, requires_grad=True), torch.randn(1000)

    def step(count: int) -> None:
        y = x * given  # keeps both, which are there anyway
        for _ in range(count):
            y = y.exp()  # keeps its result
        (y[:10] * y[10:20]).sum().backward()  # parts of one that is kept

    for count in (1, 2, 5):
        assert limits.kept_bytes(partial(step, count), given) == 4000 * count
    assert limits.kept_bytes(partial(step, 1)) == 8000  # negative control: nobody said that `given` was there


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_steps_memory_is_its_own() -> None:
    def step(megabytes: int) -> None:
        torch.zeros(megabytes << 18).add_(1)

    for megabytes in (64, 192):
        grown = limits.step_memory(partial(step, megabytes))
        # the system counts pages in batches, and the interpreter has some of its own
        assert grown is not None and (megabytes - 1) << 20 <= grown < (megabytes + 32) << 20


def test_the_peak_is_the_best_of_several_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    few = limits.peak(torch.float32, seconds=0.05)
    monkeypatch.setattr(limits, "_SHAPES", ((2, 2, 2),))
    assert few > 10 * limits.peak(torch.float32, seconds=0.001) > 0  # a product of nothing but its call is no peak


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128, 16, 4), (64, 32, 32, 8)])
def test_our_backends_keep_at_most_half_as_much_again_as_a_dense_network(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """(The reference keeps what autograd keeps: more, which is the negative control.)"""
    bench = Bench(case := Case(*shape, dtype, tokens=512))
    routing = draw_routing(case, "fresh", torch.Generator().manual_seed(0))
    given = [value for value in vars(routing).values() if isinstance(value, torch.Tensor)]
    steps = {"dense": bench.dense(), **{name: bench.backend(name) for name in ("native", "portable", "reference")}}
    kept = {name: limits.kept_bytes(partial(step, routing), *given) for name, step in steps.items()}
    assert kept["native"] <= 1.5 * kept["dense"] and kept["portable"] <= 1.5 * kept["dense"] < kept["reference"]
