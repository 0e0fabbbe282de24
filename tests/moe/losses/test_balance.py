"""mue.moe.losses.balance against sums written out in float64."""

from __future__ import annotations

import pytest
import torch

from mue.moe import Routing, load_balance_loss
from mue.moe.losses.balance import load_balance, sequence_balance
from mue.moe.routing import routing_stats


def routed(tokens: int, experts: int, active: int, *, sequence: int | None = None, ragged: bool = False) -> Routing:
    """Random scores (affinities: rows do not sum to one) and random experts; ragged: some pairs are padding."""
    torch.manual_seed(tokens)
    expert_TK = torch.stack([torch.randperm(experts)[:active] for _ in range(tokens)])
    weight_TK = torch.rand(tokens, active)
    if ragged:
        expert_TK[::3, 1:], weight_TK[::3, 1:] = experts, 0.0
    routing = Routing.from_topk(expert_TK, weight_TK, experts)
    routing.scores_TN = (2 * torch.rand(tokens, experts, dtype=torch.float64)).requires_grad_()
    routing.sequence = sequence
    return routing


def test_balance_loss_is_one_when_balanced_and_n_when_collapsed() -> None:
    uniform = torch.full((6, 4), 0.25)
    assert load_balance_loss(uniform, torch.tensor([3, 3, 3, 3])).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert load_balance_loss(collapsed, torch.tensor([12, 0, 0, 0])).item() == pytest.approx(4)


def test_balance_loss_pushes_the_crowded_expert_down() -> None:
    logit_TN = torch.zeros(6, 4, requires_grad=True)
    loss = load_balance_loss(logit_TN.softmax(1), torch.tensor([9, 1, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, logit_TN)
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1:] < 0).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_the_balance_of_every_sequence_and_of_all(ragged: bool) -> None:
    routing = routed(24, 5, 3, sequence=6, ragged=ragged)
    assert routing.scores_TN is not None
    share_TN = (routing.scores_TN / routing.scores_TN.sum(1, keepdim=True)).tolist()

    def by_hand(tokens: range) -> float:
        count = [0] * 5
        for token, expert in zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True):
            if token in tokens and expert < 5:
                count[expert] += 1
        mean = [sum(share_TN[t][i] for t in tokens) / len(tokens) for i in range(5)]
        return 5 * sum(c / sum(count) * p for c, p in zip(count, mean, strict=True))

    each = [by_hand(range(begin, begin + 6)) for begin in range(0, 24, 6)]
    assert sequence_balance(routing).item() == pytest.approx(sum(each) / 4, rel=1e-12)
    assert load_balance(routing).item() == pytest.approx(by_hand(range(24)), rel=1e-12)
    assert abs(sum(each) / 4 - by_hand(range(24))) > 1e-3  # the control: these are two losses
    routing.sequence = 24
    assert sequence_balance(routing).item() == pytest.approx(load_balance(routing).item(), rel=1e-12)


def test_a_batch_may_be_balanced_that_no_sequence_of_it_is() -> None:
    """Each of two sequences has one expert for itself: the batch's loss is at its least, the sequences' at its most."""
    expert_T1 = torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    routing = Routing.from_topk(expert_T1, torch.ones(6, 1), 2)
    routing.scores_TN, routing.sequence = torch.nn.functional.one_hot(expert_T1[:, 0], 2).double(), 3
    assert load_balance(routing).item() == pytest.approx(1) and sequence_balance(routing).item() == pytest.approx(2)


def test_dropped_pairs_count_as_asked_for() -> None:
    routing = routed(8, 4, 2)
    kept = load_balance(routing).item()
    routing.stats["demand"] = torch.tensor([16, 0, 0, 0])
    assert routing.scores_TN is not None
    first = (routing.scores_TN / routing.scores_TN.sum(1, keepdim=True))[:, 0].mean().item()
    assert load_balance(routing).item() == pytest.approx(4 * first) != kept


def test_nothing_underflows_and_what_is_missing_is_named() -> None:
    routing = routed(4, 3, 2)
    routing.scores_TN = torch.zeros(4, 3, requires_grad=True)
    load_balance(routing).backward()
    assert routing.scores_TN.grad is not None and routing.scores_TN.grad.isfinite().all()
    with pytest.raises(
        ValueError, match=r"sequence_balance reads how long sequences are.*\(sequences, tokens, width\)"
    ):
        sequence_balance(routing)
    routing.scores_TN = None
    with pytest.raises(ValueError, match=r"load_balance reads the router's scores.*set routing\.scores_TN"):
        load_balance(routing)


def test_no_tokens_cost_nothing() -> None:
    empty = Routing.empty(0, 3)
    empty.stats, empty.scores_TN, empty.sequence = routing_stats(empty), torch.zeros(0, 3), 4
    assert load_balance(empty).item() == sequence_balance(empty).item() == 0
