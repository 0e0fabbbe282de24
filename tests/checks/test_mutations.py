"""The mutation table: seeded faults are caught and named, right models raise no alarm, in every family and form.

`make test` walks the lab's own models, twelve named families and one more by the dice, each with a share of the faults that falls by
the dice; `make slow` walks all families with all faults, and benchmarks/mutations.py keeps that as docs/results/checks.json.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from support.dice import dice
from support.wiring.case import OURS, right
from support.wiring.families import LISTING, NAMED, accepted
from support.wiring.fault import broken, load, names_it, possible

torch.set_num_threads(1)
HF = importlib.util.find_spec("transformers") is not None
HERE = (*OURS, *NAMED) if HF else tuple(OURS)
# One in so many pairs of fault and family in `make test`; of faults of Muon one in as many as there are families.
SHARE, SHARE_OF_MUON = 6, len(HERE)
STRUCTURE = {"multipliers", "loss", "attention scale", "moved", "init", "groups", "scheduler", "coverage"}


def drawn() -> dict[str, list[str]]:
    """By fault: a share of the families that it is possible in, at least one; the same in all tests of a run."""
    roll = dice("mutations")
    listed = json.loads(LISTING.read_text(encoding="utf-8"))["impossible"]  # a test below compares it
    found = {}
    for name, fault in load().items():
        cannot = {family for many in listed.get(name, {}).values() for family in many}
        can = [family for family in HERE if family not in cannot]
        share = SHARE_OF_MUON if fault.muon else SHARE
        found[name] = roll.sample(can, min(len(can), max(1, round(len(can) / share))))
    return found


def no_alarm(family: str) -> None:
    for c in right(family):
        report = c.check()
        assert not report.failures, (c.form, c.autocast, report)
        assert {f.check for f in report.findings if f.status in ("pass", "warn")} >= STRUCTURE, report


def unnamed(pairs: list[tuple[str, str]]) -> list[str]:
    """Of these, the faults that no failing finding names, but for the known ones."""
    known = json.loads(LISTING.read_text(encoding="utf-8"))["not named"]
    left = []
    for name, family in pairs:
        made, culprit = broken(name, family)
        report = made.check(only=load()[name].checks)
        if not names_it(report, culprit, load()[name].warns) and family not in known.get(name, ()):
            left.append(f"{name}: {[(f.check, f.where) for f in report.failures]}")
    return left


@pytest.mark.parametrize("family", HERE)
def test_right_models_raise_no_alarm(family: str) -> None:
    no_alarm(family)


@pytest.mark.parametrize("family", HERE)
def test_a_share_of_the_faults_is_named(family: str) -> None:
    """Over the families every fault is tried in every run; which where is the dice's."""
    left = unnamed([(name, family) for name, families in drawn().items() if family in families])
    assert not left, left


@pytest.mark.skipif(not HF, reason="model families need the hf extra")
def test_another_family_by_the_dice() -> None:
    roll = dice("another family")
    family = roll.choice([f for f in accepted() if f not in NAMED])
    print(family)
    no_alarm(family)
    left = unnamed(roll.sample(list(possible((family,))), 12))
    assert not left, (family, left)


@pytest.mark.skipif(not HF, reason="model families need the hf extra")
def test_what_is_impossible_is_written_down() -> None:
    """For the named families here; benchmarks/mutations.py --listing writes it for all."""
    written = json.loads(LISTING.read_text(encoding="utf-8"))["impossible"]
    for name, fault in load().items():
        here = {family: fault.impossible(family) for family in HERE}
        listed = {family: why for why, many in written.get(name, {}).items() for family in many if family in here}
        assert {family: why for family, why in here.items() if why} == listed, name


@pytest.mark.skipif(not HF, reason="some faults need a model family")
def test_every_fault_is_tried_where_it_is_possible() -> None:
    tried = drawn()
    assert set(tried) == set(load()) and all(tried.values())


def test_faults_say_what_they_break() -> None:
    assert len(load()) >= 90
    assert all(fault.breaks and fault.checks for fault in load().values())


@pytest.mark.slow
@pytest.mark.parametrize("family", (*OURS, *accepted()) if HF else tuple(OURS))
def test_every_family(family: str) -> None:
    no_alarm(family)
    left = unnamed(list(possible((family,))))
    assert not left, left
