"""Expert choice within a sequence: equal loads in each, and nothing of another sequence."""

from __future__ import annotations

import pytest
import torch

import mue
from mue.moe import MoELayer
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.expert_choice import ExpertChoiceRouter

L, N, A = 12, 6, 2


def layer_of(**settings: str) -> MoELayer:
    torch.manual_seed(0)
    options = RouterOptions(settings={"within": "sequence", **settings})
    layer = MoELayer(8, ExpertChoiceRouter(8, N, A, options=options), expert_width=8).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_each_expert_takes_its_best_of_each_sequence(training: bool) -> None:
    layer = layer_of().train(training)
    x = torch.randn(4, L, 8, dtype=torch.float64)
    _, routing = layer(x)
    assert layer.router is not None
    score = torch.softmax(layer.router.logits(x.view(-1, 8)), 1).view(4, L, N)
    expected = {
        (s * L + t, e) for s in range(4) for e in range(N) for t in score[s, :, e].topk(L * A // N).indices.tolist()
    }
    assert set(zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True)) == expected
    weight = score.view(-1, N)[routing.token_P, routing.expert_P]
    assert torch.allclose(routing.weight_P, weight)  # R is 1 here


def test_a_sequence_alone_is_the_sequence_in_a_batch() -> None:
    layer, x = layer_of(), torch.randn(4, L, 8, dtype=torch.float64)
    assert torch.allclose(layer(x)[0][2:3], layer(x[2:3])[0], rtol=0, atol=1e-14)
    whole = layer_of(within="batch")
    assert not torch.allclose(whole(x)[0][2:3], whole(x[2:3])[0])


def test_what_cannot_be_taken_in_whole_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10·2/6 = 3.33333 of its 10 tokens"):
        layer_of()(torch.randn(1, 10, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape \\(sequences, tokens, width\\)"):
        layer_of()(torch.randn(12, 8, dtype=torch.float64))
    shape = mue.MoE.parse(
        "6e2a",
        width=32,
        expert=32,
        layers=1,
        head_dim=16,
        sequence=10,
        router="expert-choice",
        router_settings={"within": "sequence"},
    )
    with pytest.raises(ValueError, match="whole number"):
        mue.transfer(mue.Dense(32, 32, 1, head_dim=16, sequence=10), shape, mue.HParams(0.01, 0.1, 0.1))
