"""Three models as people write their own: right, all that can be measured is, and is green; each wrong wiring is refused by name."""

from __future__ import annotations

import pytest
import torch

from mue.checks.report import PASS, SKIP, WARN
from support.own_models.case import STEPS, Slip, check
from support.own_models.slips import SLIPS

# no checkpoint; the plan does not clip, and it is AdamW's, with nothing for Muon to move
NOT_GIVEN = {"plan hash", "clipping", "momentum", "update scale"}


def one_cycle(optimizer: torch.optim.Optimizer) -> object:
    """Right: a list of peaks."""
    peaks = [g["lr"] for g in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=STEPS, cycle_momentum=False)


RIGHT = {
    f"{kind}{', folded' if folded else ''}": Slip(kind, "", folded=folded)
    for kind in ("fused", "lists", "tied")
    for folded in (False, True)
} | {
    "lists, the loss alone": Slip("lists", "", only_loss=True),
    "tied, OneCycleLR": Slip("tied", "", scheduler=one_cycle),
    "lists, ReduceLROnPlateau": Slip("lists", "", folded=True, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau),
}
# Caught, but as a warning: an encoder sees both ways, and a batch may stand in for one.
WARNED = {
    "no causal mask": (Slip("fused", "", wrong=["no mask"]), "attention scale"),
    "targets not shifted": (Slip("tied", "", wrong=["unshifted"]), "loss"),
}


@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_right_models_are_green_and_measured_whole(right: Slip) -> None:
    report = check(right, raises=False)
    assert report.ok, str(report)
    assert not report.warnings, str(report)
    statuses = {f.check: f.status for f in report.findings}
    assert {name for name, status in statuses.items() if status == SKIP} == NOT_GIVEN
    assert {status for name, status in statuses.items() if name not in NOT_GIVEN} == {PASS}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS)
def test_wrong_wirings_are_named(slip: Slip) -> None:
    with pytest.raises(ValueError, match=slip.named):
        check(slip)


@pytest.mark.parametrize(("slip", "where"), WARNED.values(), ids=WARNED)
def test_what_may_be_meant_is_a_warning(slip: Slip, where: str) -> None:
    assert [f.check for f in check(slip).findings if f.status == WARN] == [where]
