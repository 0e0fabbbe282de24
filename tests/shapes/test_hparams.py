"""What was tuned and for how long: values that are refused, optimizers that are known."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import mue
from mue.shapes import OPTIMIZERS, HParams
from mue.shapes.hparams import warmup_steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0}, "lr must be greater than 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": "1e-3"}, "lr must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"init_std": 0}, "init_std must be greater than 0"),
        ({"eps": 0}, "eps must be greater than 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "beta2 must be at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, "beta1 must be at least 0"),
        ({"clip": 0}, "clip must be greater than 0"),
        (
            {"warmup": 1},
            r"warmup must be a fraction of the run \(below 1\) or a whole number of steps \(from 2\), got 1",
        ),
        ({"warmup": 20.5}, "or a whole number of steps"),
        ({"warmup": -0.1}, "warmup must be at least 0"),
        ({"floor": -1}, "floor must be at least 0"),
        ({"balance": float("inf")}, "balance must be a finite number"),
        ({"optimizer": "adam"}, "'adam' is not understood.*did you mean 'adamw'"),
        ({"optimizer": "prodigy"}, "'prodigy' is not understood"),
        ({"roles": {"embedding": {"rate": 1}}}, "unknown key 'rate' in tuned.roles.embedding"),
        ({"roles": {"embedding": {"lr": 0}}}, "tuned.roles.embedding.lr must be greater than 0"),
        ({"roles": {"embedding": 3}}, "must be a table"),
    ],
)
def test_bad_tuned(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "init_std": 0.02}
    mue.HParams(**good)
    with pytest.raises(ValueError, match=message):
        mue.HParams(**{**good, **change})


def test_bad_training() -> None:
    assert mue.Training(8, 100).tokens == 800
    for bad in ((0, 1), (1, 0), (1.5, 10), (256, float("nan")), (8, -1)):
        with pytest.raises(ValueError, match="training"):
            mue.Training(*bad)  # type: ignore[arg-type]


def test_every_known_optimizer_is_accepted() -> None:
    for optimizer in OPTIMIZERS:
        assert mue.HParams(1e-3, 0.1, 0.02, optimizer=optimizer).optimizer == optimizer


def test_numbers_of_numpy_are_plain_ones_afterwards() -> None:
    given = mue.HParams(
        np.float64(1e-3), np.float32(0.5), Fraction(1, 8), betas=(np.float64(0.9), 0.95), clip=np.int64(1)
    )
    assert given == mue.HParams(1e-3, 0.5, 0.125, clip=1.0) and json.dumps(given.to_dict())
    assert mue.Training(np.int64(8), 100.0) == mue.Training(8, 100)  # type: ignore[arg-type]
    assert type(mue.Training(np.int64(8), 100.0).steps) is int  # type: ignore[arg-type]
    assert type(mue.Convention(np.float32(0.125)).attention_scale) is float


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.05, 50), (0.999, 999), (2, 2), (2000, 2000)])
def test_a_warmup_is_a_fraction_of_the_run_or_steps(warmup: float, steps: int) -> None:
    tuned = HParams(1e-3, 0.1, 0.02, warmup=warmup)
    assert warmup_steps(tuned.warmup, 1000) == steps
    assert HParams(**tuned.to_dict()) == tuned
