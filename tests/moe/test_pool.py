"""A pool of experts: what a layer computes with it, whose gradient it has, and that it is in a model once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import ExpertPool, MoELayer, Router
from mue.moe.routers.base import RouterOptions
from support.expert_cases import EXACT, assert_close

N, A, D, H, LAYERS = 6, 2, 8, 5, 3


def pooled(backend: str = "auto", gated: bool = True) -> tuple[ExpertPool, list[MoELayer]]:
    torch.manual_seed(3)
    pool = ExpertPool(D, N, H, gated=gated).double()
    made = [MoELayer(D, Router(D, N, A), H, 1, gated=gated, backend=backend, pool=pool).double() for _ in range(LAYERS)]
    return pool, made


def own(layer: MoELayer, pool: ExpertPool) -> MoELayer:
    """The same layer with a copy of the pool's experts as its own."""
    alone = MoELayer(D, Router(D, N, A), H, 1, gated=layer.gated, backend=layer.backend).double()
    matrices = {f"experts_{name}": value for name, value in pool.state_dict().items()}
    alone.load_state_dict({**layer.state_dict(), **matrices})
    return alone


def stacked(layers: list[MoELayer], x: Tensor) -> Tensor:
    for layer in layers:
        x = x + layer(x)[0]
    return x.square().sum()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", EXACT)
def test_a_layer_reads_the_pool_as_it_would_its_own(backend: str, gated: bool) -> None:
    pool, layers = pooled(backend, gated)
    x = torch.randn(11, D, dtype=torch.float64)
    for layer in layers:
        assert_close(layer(x)[0], own(layer, pool)(x)[0], 1e-12)
    before = layers[0](x)[0]
    with torch.no_grad():
        pool.down.mul_(1.01)  # type: ignore[union-attr]
    assert not torch.allclose(layers[0](x)[0], before, rtol=1e-4)  # negative control: it is the pool that is read


@pytest.mark.parametrize("backend", EXACT)
def test_its_gradient_is_the_sum_over_the_layers(backend: str) -> None:
    """Against layers with experts of their own, whose gradients are added up, and against finite differences."""
    pool, layers = pooled(backend)
    x = torch.randn(11, D, dtype=torch.float64)
    alone = [own(layer, pool) for layer in layers]
    stacked(layers, x).backward()
    stacked(alone, x).backward()
    for name, parameter in pool.named_parameters():
        each = [layer.get_parameter(f"experts_{name}").grad for layer in alone]
        assert parameter.grad is not None and all(g is not None and g.any() for g in each)
        assert_close(parameter.grad, sum(each), 1e-12)  # type: ignore[arg-type]
        assert not torch.allclose(parameter.grad, sum(each[1:]), rtol=1e-3)  # type: ignore[arg-type]  # negative control
        direction, step = torch.randn_like(parameter), 1e-6
        sides = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                sides.append(stacked(layers, x).item())
                parameter.sub_(sign * step * direction)
        slope = (sides[0] - sides[1]) / (2 * step)
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5)


def test_a_model_has_it_once() -> None:
    shape = mue.MoE.parse("6e2a1s2p", width=32, expert=16, layers=4, head_dim=16, sequence=32)
    model = LanguageModel(shape)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "experts" in name or "pools" in name]
    assert names == [f"pools.{i}.{part}" for i in range(2) for part in ("gate", "up", "down")]
    assert sum(value.numel() for value in model.parameters()) == shape.parameters
    assert [name for name in model.state_dict() if name in names] == names
    pools = [block.moe.pool for block in model.blocks]
    assert pools[0] is pools[1] is model.pools[0] and pools[2] is pools[3] is model.pools[1]
    assert pools[0] is not pools[2]
    again = copy.deepcopy(model)
    assert all(block.moe.pool is again.pools[i // 2] for i, block in enumerate(again.blocks))
    assert again.pools[0] is not model.pools[0]
    assert not hasattr(LanguageModel(mue.MoE.parse("6e2a", width=32, expert=16, layers=2, head_dim=16)), "pools")


def test_what_does_not_fit_is_refused() -> None:
    for pool in (ExpertPool(D, N + 1, H), ExpertPool(D, N, H + 1), ExpertPool(D, N, H, gated=False)):
        with pytest.raises(
            ValueError, match="the layer reads experts=6, width=8, expert_width=5, gated=True, and the pool"
        ):
            MoELayer(D, Router(D, N, A), H, pool=pool)
    block = mue.Block(layers=2, experts=N, active=A, expert=H, pools=1)
    with pytest.raises(
        ValueError, match=r"the experts of 6e2a1p lie in pools that layers share: give this layer's as pool="
    ):
        MoELayer.from_block(block, D, RouterOptions())
    with pytest.raises(ValueError, match="must be >= 1"):
        ExpertPool(D, 0, H)
