"""MoELayer: shared experts, the dense limit, checkpointing, torch.compile, balance modes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mue.moe import MoELayer, Router
from support.expert_cases import EXACT, assert_close
from support.precision import close


def layer_like(shared_experts: int, shared_width: int) -> MoELayer:
    return MoELayer(6, Router(6, 4, 2), 5, shared_experts, shared_width).double()


def test_n_shared_of_width_h_are_one_of_n_times_h() -> None:
    """n_s shared experts are one of n_s times the width, and what the two layers hold is the same tensors' shapes."""
    torch.manual_seed(7)
    many, one = layer_like(3, 4), layer_like(1, 12)
    one.load_state_dict(many.state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert close(many(x)[0], one(x)[0], operations=3 * 12)
    assert not close(1.01 * many(x)[0], one(x)[0], operations=3 * 12)  # negative control
    assert many.shared_up is not None and many.shared_gate is not None and many.shared_down is not None
    by_hand = torch.zeros_like(x)  # the three experts one by one
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        by_hand += (F.silu(x @ many.shared_gate[rows].T) * (x @ many.shared_up[rows].T)) @ many.shared_down[:, rows].T
    alone = MoELayer(6, None, 5, 3, 4).double()
    alone.load_state_dict({k: v for k, v in many.state_dict().items() if k.startswith("shared_")})
    y, routing = alone(x)
    assert_close(y, by_hand, 1e-12)
    assert routing.num_pairs == 0 and routing.num_experts == 0 and alone.router is None
    with pytest.raises(RuntimeError):  # negative control: another total width is another layer
        layer_like(2, 4).load_state_dict(many.state_dict())


@pytest.mark.parametrize("backend", EXACT)
def test_one_expert_always_on_is_the_dense_ffn(backend: str) -> None:
    torch.manual_seed(8)
    layer = MoELayer(6, Router(6, 1, 1), 9, output_multiplier=0.25, backend=backend).double()
    assert layer.experts_gate is not None and layer.experts_up is not None and layer.experts_down is not None
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    gate, up, down = layer.experts_gate[0], layer.experts_up[0], layer.experts_down[0]
    dense = 0.25 * (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_close(layer(x)[0], dense, 1e-12)
    doubled = MoELayer(6, Router(6, 1, 1, route_scale=2.0), 9, output_multiplier=0.25, backend=backend).double()
    doubled.load_state_dict(layer.state_dict())
    assert_close(doubled(x)[0], 2 * dense, 1e-12)  # negative control: R is seen


def test_activation_checkpointing() -> None:
    torch.manual_seed(9)
    layer = MoELayer(8, Router(8, 6, 2), 5, shared_experts=1)
    x = torch.randn(30, 8, requires_grad=True)
    gradients = []
    for wrapped in (False, True, "scaled"):
        layer.zero_grad()
        x.grad = None
        y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if wrapped else layer(x)[0]
        torch.autograd.backward((1.01 if wrapped == "scaled" else 1) * y.square().sum())
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    operations = 2 * (3 * 8 + 30)  # three products forward and back, and the sum over tokens
    for plain, again, scaled in zip(*gradients, strict=True):
        assert plain is not None and again is not None and scaled is not None and plain.any()
        assert close(again, plain, operations=operations)
        assert not close(scaled, plain, operations=operations)  # negative control


@pytest.mark.parametrize(("backend", "dtype"), [("native", torch.float32), ("portable", torch.bfloat16)])
def test_torch_compile_has_no_graph_break(backend: str, dtype: torch.dtype) -> None:
    """aot_eager traces forward and backward without needing a C++ compiler; another token count is no new trace."""
    torch.manual_seed(10)
    torch._dynamo.reset()
    layer = MoELayer(8, Router(8, 6, 2), 5, shared_experts=1, backend=backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    rounding = 1e-6 if dtype == torch.float32 else 0.02
    for tokens in (30, 17):
        x = torch.randn(tokens, 8)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = module(x)[0]
            torch.autograd.backward(y.float().square().sum())
            results.append([y.detach(), *(p.grad for p in layer.parameters())])
        for plain, traced in itertools.zip_longest(*results):
            assert plain is not None and traced is not None
            assert_close(traced, plain, rounding)
    with pytest.raises(Exception, match=r"(?i)graph break|data.dependent"):  # negative control
        torch.compile(MoELayer(8, Router(8, 6, 2), 5, backend="reference"), backend="aot_eager", fullgraph=True)(x)


def test_notation_is_shown() -> None:
    assert "16e4a2g1s" in repr(MoELayer(8, Router(8, 16, 4, 2), 4, shared_experts=1))
    assert MoELayer(8, Router(8, 16, 4), 4).notation == "16e4a"


def test_layer_balance_modes() -> None:
    x = torch.randn(2, 20, 8)
    for mode, names, moves in (
        ("bias", set(), True),
        ("loss", {"load_balance"}, False),
        ("none", set(), False),
    ):
        router = Router(8, 6, 2, balance=mode)  # type: ignore[arg-type]
        layer = MoELayer(8, router, expert_width=4)
        _, routing = layer(x)
        assert set(routing.losses) == names
        layer.end_step_(0.1)
        assert bool(router.balance_bias.abs().max() > 0) == moves
