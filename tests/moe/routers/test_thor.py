"""mue.moe.routers.thor: one expert of a layer for the whole batch, and the loss that pulls two passes together."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.train.step import objective
from mue.moe.losses import consistency_loss
from mue.moe.routers.base import RouterInput, RouterOptions
from mue.moe.routers.thor import ThorRouter
from support.precision import close

SHAPE = mue.MoE.parse("4e1a", width=32, expert=16, layers=2, head_dim=16, sequence=16, router="thor")


def drawn(router: ThorRouter, draw: int = 0) -> Tensor:
    return router(torch.zeros(40, 4), RouterInput(draw=draw)).expert_P  # type: ignore[no-any-return]


def test_one_expert_for_the_batch_uniformly_drawn() -> None:
    """Per step, layer, seed and pass; over 2,000 steps each of 5 experts is drawn within 4σ of a fifth of the time."""
    router, load_N = ThorRouter(4, 5, 1), torch.zeros(5)
    passes = 0
    for _ in range(2000):
        chosen_T = drawn(router)
        assert (chosen_T == chosen_T[0]).all() and torch.equal(chosen_T, drawn(router))
        load_N[chosen_T[0]] += 1
        passes += int(chosen_T[0] == drawn(router, 1)[0])
        router.end_step_(0.0)
    assert (load_N - 400).abs().max() < 4 * math.sqrt(2000 * 0.2 * 0.8)
    assert abs(passes - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8)  # the second pass draws by itself
    layers = torch.tensor([int(drawn(ThorRouter(4, 5, 1, options=RouterOptions(layer=i)))[0]) for i in range(500)])
    assert (torch.bincount(layers, minlength=5) - 100).abs().max() < 4 * math.sqrt(500 * 0.2 * 0.8)


def test_evaluation_draws_for_every_token_and_can_be_repeated() -> None:
    router = ThorRouter(4, 5, 1).eval()
    chosen_T = router(torch.zeros(5000, 4)).expert_P
    assert (torch.bincount(chosen_T, minlength=5) - 1000).abs().max() < 4 * math.sqrt(5000 * 0.2 * 0.8)
    router.end_step_(0.0)
    assert torch.equal(chosen_T, router(torch.zeros(5000, 4)).expert_P)


def test_the_consistency_loss_is_the_symmetric_divergence() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(3, 4, 7, dtype=torch.float64) for _ in range(2))
    both = [
        F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum") for a, b in ((p, q), (q, p))
    ]
    torch.testing.assert_close(consistency_loss(p, q), (both[0] + both[1]) / 2 / 12)
    assert consistency_loss(p, p + 3.0).abs() < 1e-12 and consistency_loss(p, q) > 0.1  # a shift of logits is no change
    each = consistency_loss(torch.stack((p, q)), torch.stack((q, q)))  # of variants one each
    torch.testing.assert_close(each, torch.stack((consistency_loss(p, q), consistency_loss(q, q))))


def test_two_passes_give_the_papers_objective() -> None:
    """CE1 + CE2 + α·(KL + KL)/2, halved; both passes and both sides of the divergence have a gradient."""
    torch.manual_seed(1)
    model = LanguageModel(SHAPE, consistency=True, seed=3)
    tokens, alpha = torch.randint(256, (2, 16)), 5.0
    passes = [model._pass(tokens, tokens, draw) for draw in (0, 1)]
    assert not torch.equal(passes[0].logits, passes[1].logits)  # two draws
    divergence = consistency_loss(passes[0].logits, passes[1].logits)
    output = model(tokens, tokens)
    assert passes[0].loss is not None and passes[1].loss is not None
    expected = (passes[0].loss + passes[1].loss + alpha * divergence) / 2
    torch.testing.assert_close(objective(output, {"consistency": alpha}), expected)
    objective(output, {"consistency": alpha}).backward()  # type: ignore[no-untyped-call]
    for layer in range(2):
        used = {int(p.routings[layer].expert_P[0]) for p in passes}
        weight = model.blocks[layer].moe.experts_up  # type: ignore[union-attr]
        assert {e for e in range(4) if weight.grad[e].abs().max() > 0} == used
    model.eval()
    once, again = model(tokens), model(tokens)
    assert not model(tokens, tokens).losses
    assert all(torch.equal(a.expert_P, b.expert_P) for a, b in zip(once.routings, again.routings, strict=True))
    assert len(once.routings) == 2 and close(again.logits, once.logits, operations=2 * (7 * 32 + 2 * 16) + 32)


def test_consistency_needs_a_router_that_draws() -> None:
    with pytest.raises(ValueError, match="no router of 4e2a d32 L2 draws any"):
        LanguageModel(mue.MoE.parse("4e2a", width=32, expert=16, layers=2, head_dim=16), consistency=True)
