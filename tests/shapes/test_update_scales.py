"""Conventions of Muon's rate: the same step in each, and exactly there and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.shapes.update_scales import UPDATE_SCALES, converted

sizes = st.integers(1, 1 << 20)
names = st.sampled_from(list(UPDATE_SCALES))


@given(names, names, sizes, sizes, st.floats(1e-8, 10), st.floats(0, 10))
def test_there_and_back(one: str, other: str, out: int, fan_in: int, lr: float, wd: float) -> None:
    there = converted(lr, wd, one, other, out, fan_in)
    back = converted(*there, other, one, out, fan_in)
    # below 1e-300 a float has fewer digits than that
    assert math.isclose(back[0], lr, rel_tol=1e-12) and math.isclose(back[1], wd, rel_tol=1e-12, abs_tol=1e-300)
    step, decay = (l * UPDATE_SCALES[name].factor(out, fan_in) for l, name in ((lr, one), (there[0], other))), lr * wd
    assert math.isclose(*step, rel_tol=1e-12) and math.isclose(math.prod(there), decay, rel_tol=1e-12, abs_tol=1e-300)


def test_what_the_conventions_promise() -> None:
    """Operator norm from RMS to RMS; element RMS; and torch's own numbers where it has the convention."""
    from torch.optim._muon import _adjust_lr

    for out, fan_in in ((48, 16), (16, 48), (32, 32)):
        q, _ = torch.linalg.qr(torch.randn(max(out, fan_in), min(out, fan_in), dtype=torch.float64))
        q = q if out >= fan_in else q.mT
        s = {name: one.factor(out, fan_in) for name, one in UPDATE_SCALES.items()}
        norm = float(torch.linalg.matrix_norm(q, 2)) * math.sqrt(fan_in / out)
        assert s["spectral"] * norm == pytest.approx(1)
        assert s["match-rms"] * float(q.square().mean().sqrt()) == pytest.approx(0.2)
        for name in ("keller", "match-rms"):
            assert _adjust_lr(1.0, UPDATE_SCALES[name].torch, torch.Size((out, fan_in))) == pytest.approx(s[name])
    # control: for a wide matrix Keller's has another norm
    assert UPDATE_SCALES["keller"].factor(16, 48) * math.sqrt(48 / 16) != pytest.approx(1)


def test_an_unknown_convention_and_keys_without_muon() -> None:
    values = {"lr": 0.02, "weight_decay": 0.1, "init_std": 0.02}
    with pytest.raises(ValueError, match="update_scale 'kelle' is not understood; did you mean 'keller'"):
        mue.HParams(**values, optimizer="muon", update_scale="kelle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="muon_moves lists 'routers'; did you mean 'router'"):
        mue.HParams(**values, optimizer="muon", muon_moves=("routers",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ffn and expert together or neither"):
        mue.HParams(**values, optimizer="muon", muon_moves=("expert",))  # type: ignore[arg-type]
    for key, value in {"momentum": 0.95, "adamw_lr": 1e-3, "update_scale": "keller"}.items():
        with pytest.raises(ValueError, match=f"{key} goes with optimizer = .muon., not with 'adamw'"):
            mue.HParams(**values, **{key: value})  # type: ignore[arg-type]
    for name, why in {
        "normuon": "2510.05491",
        "scion": "update_scale",
        "dion": "2504.05295",
        "muonh": "hyperp",
    }.items():
        with pytest.raises(ValueError, match=f"optimizer '{name}' has no transfer here: .*{why}"):
            mue.HParams(**values, optimizer=name)  # type: ignore[arg-type]


def test_old_files_mean_what_they_meant() -> None:
    """Before it could be given, Muon moved routers and no shared experts had an answer."""
    now = mue.HParams(lr=0.02, weight_decay=0.1, init_std=0.02, optimizer="muon")
    assert now.muon_moves == ("attention", "ffn", "expert", "shared")
    assert mue.HParams.from_dict(now.to_dict()) == now
    old = {k: v for k, v in now.to_dict().items() if k != "muon_moves"}
    assert mue.HParams.from_dict(old).muon_moves == ("attention", "ffn", "expert", "router")
    assert mue.HParams.from_dict(old).to_dict() == old
    adamw = now.replace(optimizer="adamw", muon_moves=())
    assert set(adamw.to_dict()) == set(old)
