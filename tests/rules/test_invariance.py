"""What the rule promises of one block, measured on real modules (docs/why/index.md)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mue
from mue.lab.models.language import LanguageModel

BASE = mue.Dense(64, 64, 1, head_dim=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.125)


def moe(notation: str, expert: int, width: int = 64, **more: object) -> mue.MoE:
    return mue.MoE.parse(notation, width=width, expert=expert, layers=1, head_dim=32, **more)


# Dense at several expansions, dense MoE, capacity, granularity, hybrids, groups, and another width.
SHAPES = {
    "base": BASE,
    "dense 4x": mue.Dense(64, 256, 1, head_dim=32),
    "dense moe": moe("8e8a", 32),
    "sparse": moe("8e2a", 64),
    "capacity": moe("64e2a", 64),
    "granular": moe("32e8a", 16),
    "hybrid": moe("16e4a1s", 32),
    "two shared": moe("16e4a2s", 32, shared=48),
    "groups": moe("16e4a4g1s", 32),
    "wide": moe("16e4a1s", 128, width=256),
    "wide dense": mue.Dense(256, 256, 1, head_dim=32),
}


def block(shape: mue.Dense | mue.MoE, seed: int, rule: str = "complete-mue") -> tuple[mue.Plan, nn.Module]:
    """The feed-forward branch of a model of that shape, as planned and drawn."""
    plan = mue.transfer(BASE, shape, TUNED, rule=rule)
    model = LanguageModel(shape, plan.multipliers, balance="none").double()
    plan.init_(model, seed)
    first = model.blocks[0]
    return plan, first.ffn if first.ffn is not None else first.moe


def forward(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def init_rms(shape: mue.Dense | mue.MoE, rule: str = "complete-mue") -> float:
    """RMS of the branch at init on unit-RMS inputs, over three draws."""
    total = []
    for seed in range(3):
        x = torch.randn(256, shape.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total.append(rms(forward(block(shape, seed, rule)[1], x)) ** 2)
    return math.sqrt(sum(total) / 3)


def update_rms(shape: mue.Dense | mue.MoE, part: str, rule: str = "complete-mue") -> float:
    """Change of one token's output along the loss's direction after one sign-like Adam step on ``part``, over tokens."""
    changes = []
    plan, module = block(shape, 0, rule)
    generator = torch.Generator().manual_seed(1)
    kind = "ffn" if isinstance(shape, mue.Dense) else "expert"
    rate = plan.role(f"{kind}_{part}").values.lr
    for _ in range(12):
        x = torch.randn(1, shape.width, generator=generator, dtype=torch.float64)
        toward = torch.randn(1, shape.width, generator=generator, dtype=torch.float64)
        before = forward(module, x)
        module.zero_grad()
        (before * toward).sum().backward()
        saved = {n: p.detach().clone() for n, p in module.named_parameters()}
        with torch.no_grad():
            for name, p in module.named_parameters():
                if part in name.rsplit(".", 2)[-1] or f".{part}." in f".{name}.":
                    p -= rate * p.grad.sign()
            changes.append(
                float(((forward(module, x) - before) * toward).sum() / toward.norm() / shape.width**0.5) ** 2
            )
            for name, p in module.named_parameters():
                p.copy_(saved[name])
    return math.sqrt(sum(changes) / len(changes))


@pytest.mark.parametrize("rule", ["complete-mue", "complete-mue-paper"])
def test_init_scale_is_the_same_for_every_shape(rule: str) -> None:
    reference = init_rms(BASE, rule)
    for name, shape in SHAPES.items():
        assert init_rms(shape, rule) == pytest.approx(reference, rel=0.13), name


def test_down_update_is_the_same_for_every_shape() -> None:
    reference = update_rms(BASE, "down")
    for name, shape in SHAPES.items():
        assert update_rms(shape, "down") == pytest.approx(reference, rel=0.2), name


def test_up_and_gate_updates_grow_with_the_square_root_of_the_expansion() -> None:
    """Known, reported as drift['up_gate'] and not corrected: nobody may fix it silently."""
    for part in ("up", "gate"):
        reference = update_rms(BASE, part)
        for name in ("dense 4x", "granular", "hybrid", "dense moe"):
            plan, _ = block(SHAPES[name], 0)
            measured = update_rms(SHAPES[name], part) / reference
            assert measured == pytest.approx(plan.drift["up_gate"], rel=0.25), (name, part)
    expansion = [4, 16]
    shapes = [mue.Dense(64, 64 * e, 1, head_dim=32) for e in expansion]
    slope = math.log(update_rms(shapes[1], "up") / update_rms(shapes[0], "up")) / math.log(expansion[1] / expansion[0])
    assert slope == pytest.approx(0.5, abs=0.1)


# ---- negative controls: each ingredient taken away is seen ----------------------------------------------------------


def test_without_the_route_scale_the_output_is_a_times_too_small() -> None:
    shape = SHAPES["granular"]
    _, module = block(shape, 0)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = rms(forward(module, x))
    module.router.route_scale = 1.0
    assert rms(forward(module, x)) == pytest.approx(right / 8, rel=1e-6)


def test_an_unnormalised_softmax_is_far_too_small() -> None:
    _, module = block(SHAPES["capacity"], 0)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = rms(forward(module, x))
    module.router.normalize, module.router.score = False, "softmax"
    assert rms(forward(module, x)) < 0.35 * right  # a/N = 1/32 for flat scores; the selected ones are above average


def test_without_the_output_multiplier_the_output_is_too_large() -> None:
    shape = SHAPES["dense 4x"]
    _, module = block(shape, 0)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = rms(forward(module, x))
    module.output_multiplier = 1.0
    assert rms(forward(module, x)) == pytest.approx(4 * right, rel=1e-6)


def test_standard_parametrization_fails_both() -> None:
    assert init_rms(SHAPES["dense 4x"], "standard") > 1.7 * init_rms(BASE, "standard")
    assert update_rms(SHAPES["dense 4x"], "down", "standard") > 3 * update_rms(BASE, "down", "standard")


def test_measured_gates_restore_the_init_scale() -> None:
    """docs/why/index.md#gates: with the measured moments of an un-renormalised softmax the branch is right again."""
    plain = moe("32e8a", 16, router="softmax", normalize=False, gates="measured", gate_moments=(1.0, 1 / 8))
    plan = mue.transfer(BASE, plain, TUNED)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = LanguageModel(plain, plan.multipliers, balance="none").double()
    plan.init_(model, 0)
    from mue.moe import gate_moments

    _, routing = model.blocks[0].moe(x)
    moments = gate_moments(routing)
    assert moments[0] < 0.8  # far from the 1 that was claimed
    wrong = rms(forward(model.blocks[0].moe, x))
    shape = replace(plain, gate_moments=moments)
    plan = mue.transfer(BASE, shape, TUNED)
    model = LanguageModel(shape, plan.multipliers, balance="none").double()
    plan.init_(model, 0)
    right = rms(forward(model.blocks[0].moe, x))
    reference = init_rms(BASE)
    assert right == pytest.approx(reference, rel=0.12)
    assert abs(wrong / reference - 1) > 0.2
