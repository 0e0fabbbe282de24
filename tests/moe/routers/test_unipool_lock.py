"""UniPool-lock: open, faded, locked, each at its step; who owns an expert is the best there is; a resumed run has it all."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.train.step import objective
from mue.moe import Routing
from mue.moe.losses.pool import cardinality
from mue.moe.routers.base import RouterOptions, share
from mue.moe.routers.unipool_lock import PoolLock, UniPoolLockRouter, owners

OPEN, FADE, N, L, A, D = 4, 6, 12, 3, 2, 6


def routers(**more: Any) -> tuple[list[UniPoolLockRouter], PoolLock]:
    torch.manual_seed(1)
    own = {"open_steps": OPEN, "fade_steps": FADE, "layer_experts": 3.0, **more}
    made = [UniPoolLockRouter(D, N, A, options=RouterOptions(settings=own, layer=2 * i + 1)).double() for i in range(L)]
    common = share(made)
    assert common is not None and isinstance(common["unipool_lock"], PoolLock)
    return made, common["unipool_lock"]


def walked(steps: int) -> tuple[list[UniPoolLockRouter], PoolLock, list[Routing]]:
    """Routers and their routings of one batch after so many steps."""
    made, lock = routers()
    x_TD = torch.randn(300, D, dtype=torch.float64)
    for _ in range(steps):
        for one in made:
            one(x_TD)
            one.end_step_(0.0)
        lock.end_step_(0.0)
    return made, lock, [one(x_TD) for one in made]


def test_open_it_is_unipool() -> None:
    made, lock, routings = walked(OPEN - 1)
    assert bool((lock.get_buffer("owner_0") == -1).all())
    for one, routing in zip(made, routings, strict=True):
        z_TN = routing.logits_TN
        assert z_TN is not None
        by_hand = one.constant * z_TN.topk(A, 1).values.clamp(min=0) / z_TN.norm(dim=1, keepdim=True)
        torch.testing.assert_close(routing.weight_P.view(-1, A), by_hand, rtol=1e-6, atol=1e-9)
        assert len(set(routing.expert_P.tolist())) > N // L  # more than a layer will own


@pytest.mark.parametrize("faded", [0, 1, 3, FADE, FADE + 5])
def test_scores_of_other_layers_fade_along_half_a_cosine(faded: int) -> None:
    made, lock, routings = walked(OPEN + faded)
    owner_N = lock.get_buffer("owner_0")
    assert owner_N.bincount(minlength=L).tolist() == [N // L] * L
    left = 0.5 + 0.5 * math.cos(math.pi * min(faded / FADE, 1))
    for i, (one, routing) in enumerate(zip(made, routings, strict=True)):
        mine_N = owner_N == i
        assert routing.scores_TN is not None and routing.logits_TN is not None
        z_TN = routing.logits_TN
        whole_TN = one.constant * z_TN.clamp(min=0) / z_TN.norm(dim=1, keepdim=True)  # all logits are in the norm
        wanted = whole_TN * torch.where(mine_N, 1.0, left)
        torch.testing.assert_close(routing.scores_TN, wanted, rtol=1e-6, atol=1e-9)
        weight_TK = routing.weight_P.view(-1, A)
        torch.testing.assert_close(weight_TK, wanted.topk(A, 1).values, rtol=1e-6, atol=1e-9)
        used = set(routing.expert_P.tolist())
        assert (used <= set(mine_N.nonzero()[:, 0].tolist())) == (faded >= FADE)


def test_layers_are_drawn_to_so_many_experts_while_the_pool_is_open() -> None:
    """The loss by hand; its weight rises to the end of that stage and is 0 before and after."""
    for steps, weight in ((0, 0.0), (1, 0.25), (3, 0.75), (OPEN, 0.0), (OPEN + FADE, 0.0)):
        _, _, (routing, *_) = walked(steps)
        assert routing.scores_TN is not None
        share_TN = routing.scores_TN / routing.scores_TN.sum(1, keepdim=True).clamp(min=1e-30)
        p = share_TN.mean(0).tolist()
        entropy = -sum(v * math.log(v) for v in p if v)
        wanted = weight / L * (entropy - math.log(3.0)) ** 2
        assert routing.losses["cardinality"].item() == pytest.approx(5e-3 * wanted, rel=1e-6, abs=1e-12)
    even = Routing.from_topk(torch.arange(4)[:, None], torch.ones(4, 1), 4)
    even.scores_TN = torch.eye(4)
    even.stats |= {"cardinality_weight": torch.tensor(1.0), "cardinality_target": torch.tensor(math.log(4.0))}
    assert cardinality(even).item() == pytest.approx(0, abs=1e-12)
    even.stats["cardinality_target"] = torch.tensor(0.0)
    assert cardinality(even).item() == pytest.approx(math.log(4.0) ** 2)
    del even.stats["cardinality_target"]
    with pytest.raises(ValueError, match="the loss cardinality is for routers whose pool is shared out"):
        cardinality(even)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(2, 2), (2, 4), (2, 8), (3, 6), (4, 4), (3, 3)]), st.integers(0, 10**6), st.booleans())
def test_owners_are_the_best_of_all(size: tuple[int, int], seed: int, few: bool) -> None:
    """Against every way there is; with few distinct values, too, where many are equally good."""
    layers, experts = size
    generator = torch.Generator().manual_seed(seed)
    value_LN = torch.rand(layers, experts, generator=generator, dtype=torch.float64)
    value_LN = (value_LN * 3).round() if few else value_LN
    found_N = owners(value_LN)
    assert found_N.bincount(minlength=layers).tolist() == [experts // layers] * layers
    every = set(itertools.permutations([i // (experts // layers) for i in range(experts)])) if experts <= 6 else None
    total = float(value_LN[found_N, torch.arange(experts)].sum())
    if every is not None:
        assert total == pytest.approx(max(sum(float(value_LN[o, i]) for i, o in enumerate(way)) for way in every))
    else:  # of two layers: those with the largest differences
        gain_N = (value_LN[0] - value_LN[1]).sort(descending=True).values[: experts // 2]
        assert total == pytest.approx(float(value_LN[1].sum() + gain_N.sum()))
    first = torch.arange(experts) // (experts // layers)
    assert total >= float(value_LN[first, torch.arange(experts)].sum())


def test_what_each_layer_used_most_is_its_own() -> None:
    _, lock, _ = walked(OPEN)
    used_LN, owner_N = lock.get_buffer("used_0"), lock.get_buffer("owner_0")
    assert float(used_LN[owner_N, torch.arange(N)].sum()) > 1.3 * float(used_LN.mean(0).sum())


def test_a_model_with_it_trains_and_a_copy_goes_on_as_it_would() -> None:
    shape = mue.MoE.parse(
        "8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=32, router="unipool-lock",
        router_settings={"open_steps": 3, "fade_steps": 3, "layer_experts": 4.0},
    )  # fmt: skip
    plan = mue.transfer(mue.Dense(32, 32, 2, head_dim=16, sequence=32), shape, mue.HParams(0.01, 0.1, 0.1))
    tokens = torch.randint(256, (2, 4, 32), generator=torch.Generator().manual_seed(2)).unbind(0)

    def step(model: LanguageModel, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = objective(model(*tokens), {})
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.end_step_(0.0)
        return loss.item()

    def made() -> tuple[LanguageModel, torch.optim.Optimizer]:
        model = LanguageModel(plan.target, plan.multipliers)
        plan.init_(model, seed=3)
        return model, torch.optim.AdamW(plan.param_groups(model))

    model, optimizer = made()
    losses = [step(model, optimizer) for _ in range(4)]
    again, other = made()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would have one
    assert int(again.common.unipool_lock.step) == 4  # type: ignore[union-attr]
    on, anew = ([step(*run) for _ in range(4)] for run in ((model, optimizer), (again, other)))
    assert on == anew and on[-1] < losses[0]
    again.common.unipool_lock.step.zero_()  # type: ignore[operator, union-attr]
    assert step(model, optimizer) != step(again, other)  # negative control: the stage is part of it


def test_a_pool_that_cannot_be_shared_out_is_refused() -> None:
    numbers: dict[str, Any] = {"width": 32, "expert": 16, "layers": 4, "head_dim": 16, "router": "unipool-lock"}
    for notation in ("10e1a", "4e2a"):
        with pytest.raises(ValueError, match=r"gives each of 4 layers an equal part of the \d+ experts"):
            mue.MoE.parse(notation, **numbers)
    assert mue.MoE.parse("8e2a", **numbers).pools == 1
    with pytest.raises(ValueError, match="open_steps of the unipool-lock router must be a whole number of at least 1"):
        mue.MoE.parse("8e2a", **numbers, router_settings={"open_steps": 0})


def test_readers_of_one_pool_agree_on_its_stages() -> None:
    def reader(layer: int, pool: int, **own: object) -> UniPoolLockRouter:
        return UniPoolLockRouter(D, N, A, options=RouterOptions(settings=own, layer=layer, pool=pool))

    share([reader(0, 0), reader(1, 1, fade_steps=5)])  # each its own pool: nothing to agree on
    with pytest.raises(ValueError, match=r"layers 0 and 1 .* fade_steps = 1000 and 5"):
        share([reader(0, 0), reader(1, 0, fade_steps=5)])
    with pytest.raises(
        ValueError, match=r"layers 0, 1 read pool 0, and choose from \[12, 24\] experts: number the pools"
    ):
        share([reader(0, 0), UniPoolLockRouter(D, 2 * N, A, options=RouterOptions(layer=1))])
