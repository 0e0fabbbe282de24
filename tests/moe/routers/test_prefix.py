"""mue.moe.routers.prefix: the smallest set of experts with the mass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.moe.routers.prefix import even_sums, prefix_of_mass, raw_weights


def probabilities(seed: int, tokens: int, experts: int, sharpness: float) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(tokens, experts) * sharpness).softmax(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    experts=st.integers(1, 70),
    sharpness=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    mass=st.floats(1e-3, 1.0),
    likely=st.integers(1, 80),
)
def test_the_mass_is_reached_and_not_without_the_last(
    seed: int, tokens: int, experts: int, sharpness: float, mass: float, likely: int
) -> None:
    """Σ P of those inside is at least p, and below it without the last of them (in float64, to the rounding of the sum)."""
    prob_TN = probabilities(seed, tokens, experts, sharpness)
    expert_TK = prefix_of_mass(prob_TN, mass, likely)
    inside_TK = expert_TK < experts
    picked_TK = raw_weights(prob_TN.double(), expert_TK)
    used = [[e for e in row if e < experts] for row in expert_TK.tolist()]
    assert (picked_TK.diff(dim=1) <= 0).all() and all(len(set(row)) == len(row) for row in used)
    assert inside_TK[:, 0].all() and (inside_TK.int().diff(dim=1) <= 0).all()  # a prefix, of at least one
    assert not tokens or int(inside_TK.sum(1).max()) == inside_TK.shape[1]  # no wider than somebody needs
    sums_T = picked_TK.sum(1)
    slack = experts * 1.2e-7
    assert (sums_T >= mass - slack).all()
    last_T1 = inside_TK.sum(1, keepdim=True) - 1
    without_T = sums_T - picked_TK.gather(1, last_T1)[:, 0]
    assert ((without_T < mass + slack) | (mass >= 1.0)).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 70), mass=st.floats(1e-3, 1.0))
def test_what_is_likely_changes_nothing(seed: int, experts: int, mass: float) -> None:
    prob_TN = probabilities(seed, 9, experts, 1.0)
    found = [prefix_of_mass(prob_TN, mass, likely) for likely in (1, 5, experts)]
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_everything_at_one_and_one_near_nothing() -> None:
    prob_TN = probabilities(0, 7, 16, 30.0)  # of which the float32 sum of the first few is 1 already
    assert prefix_of_mass(prob_TN, 1.0, 2).shape == (7, 16) and (prefix_of_mass(prob_TN, 1.0, 2) < 16).all()
    assert prefix_of_mass(prob_TN, 1e-6, 2).shape == (7, 1)
    assert (prefix_of_mass(prob_TN, 0.999, 2) < 16).sum() < 7 * 16  # the control


def test_weights_are_the_probabilities_with_their_gradient() -> None:
    """Against float64 and autograd on a dense formula; divided by the sum they are other numbers (the control)."""
    torch.manual_seed(1)
    logit_TN = (torch.randn(6, 8, dtype=torch.float64) * 1.5).requires_grad_()
    expert_TK = prefix_of_mass(logit_TN.detach().softmax(1), 0.8, 3)
    used_TN = torch.zeros(6, 9, dtype=torch.float64).scatter(1, expert_TK, 1.0)[:, :8]
    value_TN, found = torch.randn(6, 8, dtype=torch.float64), []
    value_TK = torch.nn.functional.pad(value_TN, (0, 1)).gather(1, expert_TK)
    for renormalise in (False, True):
        prob_TN = logit_TN.softmax(1)
        weight_TK = even_sums(logit_TN, expert_TK, 3.0) if renormalise else 3.0 * raw_weights(prob_TN, expert_TK)
        dense_TN = prob_TN * used_TN
        dense_TN = dense_TN / dense_TN.sum(1, keepdim=True) if renormalise else dense_TN
        ours, theirs = (weight_TK * value_TK).sum(), 3.0 * (dense_TN * value_TN).sum()
        torch.testing.assert_close(ours, theirs)
        own, exact = (torch.autograd.grad(end, logit_TN, retain_graph=True) for end in (ours, theirs))
        torch.testing.assert_close(own, exact)
        single_TK = even_sums(logit_TN.detach().float(), expert_TK, 3.0)  # by the kernel, where it is there
        assert not renormalise or torch.allclose(single_TK, weight_TK.float(), atol=1e-5)
        found.append(float(ours.detach()))
    assert abs(found[0] - found[1]) > 1e-3
