"""Measured gates: the family's own router against an independent Monte Carlo, and what the numbers do in a plan."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch
from typer.testing import CliRunner

import mue
from mue.cli import app
from mue.fold import fold
from mue.layouts.inspect import inspect, measure_gates
from mue.layouts.observe.gates import record_gates
from mue.layouts.transformers.configs import build, default_config
from mue.layouts.transformers.describe import describe_config
from mue.layouts.transformers.gate_moments import measure_gates as measured
from mue.layouts.transformers.gate_moments import moments_of
from support.stock_models import stock, tiny

torch.set_num_threads(1)
WIDTH, EXPERTS, ACTIVE = 256, 32, 4


def olmoe() -> object:
    config = default_config("olmoe")
    config.hidden_size, config.num_experts, config.num_experts_per_tok = WIDTH, EXPERTS, ACTIVE
    return config


def by_hand(std: float, draws: int = 24, tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """(m1, m2) and their errors of softmax over all, top-k kept as they are, for inputs of unit root mean square."""
    found = []
    for i in range(draws):
        g = torch.Generator().manual_seed(1000 + i)
        x = torch.randn(tokens, WIDTH, generator=g)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        scores = (x @ torch.randn(EXPERTS, WIDTH, generator=g).T * std).softmax(-1)
        kept = scores.topk(ACTIVE, -1).values
        found.append([float(kept.sum(-1).mean()), float(kept.square().sum(-1).mean())])
    both = torch.tensor(found, dtype=torch.float64)
    return both.mean(0), both.std(0) / draws**0.5


@pytest.mark.parametrize("std", [0.01, 0.05])
def test_the_familys_router_has_the_moments_of_its_formula(std: float) -> None:
    config = olmoe()
    found = measured(config, build, describe_config(config), router_std=std, tokens=1024)
    (m1, m2), (e1, e2) = by_hand(std)
    assert abs(found.m1 - m1) < 4 * (found.error1**2 + e1**2) ** 0.5 and found.error1 < 0.05 * found.m1
    assert abs(found.m2 - m2) < 4 * (found.error2**2 + e2**2) ** 0.5 and found.error2 < 0.05 * found.m2
    other, _ = by_hand(std * 1.5)  # control: moments are those of this std and of no other
    assert abs(found.m1 - other[0]) > 8 * (found.error1**2 + e1**2) ** 0.5


def test_the_models_own_draw_is_used_where_no_std_is_given() -> None:
    config = olmoe()
    found = measured(config, build, describe_config(config), draws=2, tokens=256)
    assert found.router_std == pytest.approx(config.initializer_range, rel=0.02)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="draws must be at least 2"):
        measured(config, build, describe_config(config), draws=1)


def test_gates_that_sum_to_one_need_no_measuring() -> None:
    with pytest.raises(ValueError, match="sum to 1 for every token"):
        measure_gates(tiny("mixtral"))
    with pytest.raises(ValueError, match="handed expert indices and weights"):
        moments_of(stock(tiny("llama")), lambda m: m(input_ids=torch.arange(3, 9)[None]))


def test_given_inputs_on_a_model_as_it_is() -> None:
    model = stock(tiny("olmoe"))
    x = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    seen: dict[str, object] = {}
    with torch.no_grad(), record_gates(model, seen):  # type: ignore[arg-type]
        model(input_ids=x)
    m1, m2 = moments_of(model, lambda m: m(input_ids=x))
    assert len(seen) == 2
    assert (m1, m2) == pytest.approx(
        (sum(g.total for g in seen.values()) / 2, sum(g.square for g in seen.values()) / 2)  # type: ignore[attr-defined]
    )


def test_a_plan_with_measured_moments_keeps_the_branch_at_its_size() -> None:
    """With R = a/m1 in the weights the routed sum's coefficients add up to a on average, as a normalised router's do."""
    config = tiny("olmoe")
    base = mue.Dense(width=32, ffn=32, layers=2, head_dim=16)
    tuned = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.3)
    std = tuned.init_std * 0.5**0.5  # of a router of twice the base's width
    moments = measured(config, build, describe_config(config), router_std=std, draws=16)
    shape = inspect(config, gate_moments=moments.pair).shape
    assert shape is not None
    plan = mue.transfer(base, shape, tuned)
    assert plan.roles["router"].values.init_std == pytest.approx(std)
    sums = []
    for seed in range(8):
        model = stock(config)
        fold(plan).init_(model, seed)
        sums.append(moments_of(model, lambda m: m(input_ids=torch.randint(3, 90, (4, 64))))[0])
    assert plan.route_scale is not None
    assert plan.route_scale * sum(sums) / len(sums) == pytest.approx(2, rel=0.05)  # a = 2
    wrong = inspect(config, gate_moments=(moments.m1 * 1.3, moments.m2 * 1.7)).shape  # control
    assert wrong is not None
    other = mue.transfer(base, wrong, tuned).route_scale
    assert other is not None and other * sum(sums) / len(sums) != pytest.approx(2, rel=0.05)


def test_the_command_prints_the_plans_line(tmp_path: object) -> None:
    done = CliRunner().invoke(app, ["inspect", "olmoe", "--router-std", "0.01"])
    assert isinstance(done.exception, ValueError) and "only with --measure-gates" in str(done.exception)
