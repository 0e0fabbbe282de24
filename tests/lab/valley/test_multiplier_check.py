"""A check of a given learning rate: its best run, what is given away, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest

from mue.lab.valley.multiplier_check import MultiplierCheck


def test_a_multiplier_check_is_read_back_and_names_its_best_run() -> None:
    check = MultiplierCheck.of({0.25: 2.5, 0.5: 2.1, 1.0: 2.05, 2.0: 2.0, 4.0: None})
    assert check.best == 2.0 and check.regret == pytest.approx(0.05)
    stored = json.loads(json.dumps(check.to_dict()))
    assert list(stored["losses"]) == ["0.25", "0.5", "1", "2", "4"] and stored["loss_at_1"] == 2.05
    assert MultiplierCheck.from_dict(stored) == check
    diverged = MultiplierCheck.of({1.0: None, 2.0: None})
    assert (diverged.valley, diverged.best, diverged.regret) == (None, None, None)
    assert MultiplierCheck.from_dict(diverged.to_dict()) == diverged
