"""``mue.coordinate_check`` on small models: every axis passes, wrong rules fail along theirs, mup's own check does not see what it sees."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mue
from mue.checks import CheckError, Coordinates, first_losses, overlay
from mue.checks.slopes import fitted
from mue.lab.models.language import LanguageModel
from mue.shapes import Transformer

BASE = mue.Dense(64, 64, 2, head_dim=32, sequence=32, vocab=64)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)


def batches(step: int) -> tuple[Tensor, Tensor]:
    """A small language with structure: each token follows from the last one, up to three choices."""
    g = torch.Generator().manual_seed(step + 100)
    rows = [torch.randint(0, 64, (8, 1), generator=g)]
    for _ in range(32):
        rows.append((rows[-1] * 5 + torch.randint(0, 3, (8, 1), generator=g)) % 64)
    tokens = torch.cat(rows, 1)
    return tokens[:, :-1], tokens[:, 1:]


def dense(width: int = 64, layers: int = 2, expansion: int = 1) -> mue.Dense:
    return mue.Dense(width, width * expansion, layers, head_dim=32, sequence=32, vocab=64)


def moe(notation: str = "8e2a", width: int = 64, expert: int = 32, layers: int = 2) -> mue.MoE:
    return mue.MoE.parse(notation, width=width, expert=expert, layers=layers, head_dim=32, sequence=32, vocab=64)


AXES: dict[str, list[Transformer]] = {
    "width": [dense(64), dense(128), dense(256)],
    "expansion": [dense(expansion=e) for e in (1, 2, 4)],
    "depth": [dense(layers=n) for n in (8, 16, 24)],
    "experts": [moe("4e2a"), moe("8e2a"), moe("16e2a")],
    "active": [moe("8e2a"), moe("8e4a"), moe("8e8a")],
    "granularity": [moe("8e2a", expert=32), moe("16e4a", expert=16), moe("32e8a", expert=8)],
}


def run(axis: str, rule: str = "complete-mue", shapes: Any = None, **more: Any) -> Coordinates:
    def plan(shape: Transformer) -> mue.Plan:
        return mue.transfer(BASE, shape, TUNED, rule=rule)

    def build(shape: Transformer) -> nn.Module:
        return LanguageModel(shape, plan(shape).multipliers)

    return mue.coordinate_check(
        more.pop("build", build), plan, {axis: shapes or AXES[axis]}, batches, raises=False, **more
    )


def test_overlay_tells_a_widening_gap_from_a_constant_one() -> None:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).mul(0.005).tolist()
    base = [4 - 0.01 * t for t in range(100)]
    losses = {
        "dense": base,
        "close": [b + 0.03 + n for b, n in zip(base, noise, strict=False)],
        "widening": [b + 0.001 * t + n for t, (b, n) in enumerate(zip(base, noise, strict=False))],
        "far": [b - 0.4 + n for b, n in zip(base, noise, strict=False)],
    }
    made = overlay(losses, "dense", raises=False)
    assert [(g.name, g.ok) for g in made.gaps] == [("close", True), ("widening", False), ("far", False)]
    widening = made.gaps[1]
    assert widening.low < 0.1 < widening.high and abs(widening.late) < 0.12  # small still, but sure to grow
    with pytest.raises(CheckError, match="overlay: widening"):
        overlay(losses, "dense")
    with pytest.raises(ValueError, match="too few"):
        overlay({"dense": base[:20], "close": base[:20]}, "dense")


def test_right_is_flat_wrong_is_named_and_written(tmp_path: Path) -> None:
    shapes = [dense(64), dense(128)]
    right = run("width", shapes=shapes, steps=4, seeds=(0, 1))
    assert right.ok, right
    wrong = run("width", "standard", shapes=shapes, steps=4, seeds=(0, 1))
    assert {s.module for s in wrong.failures} >= {"attention q", "ffn up", "stream", "feed-forward branch"}
    wrong.save(tmp_path / "c.json")
    wrong.plot(tmp_path / "c.png")
    data = json.loads((tmp_path / "c.json").read_text())
    assert not data["ok"] and {"slope", "low", "high", "expected", "verdict", "points"} <= set(data["slopes"][0])
    assert (tmp_path / "c.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="did you mean 'width'"):
        mue.coordinate_check(lambda s: nn.Identity(), lambda s: mue.transfer(BASE, s, TUNED), {"with": []}, batches)


def test_reused_modules_are_seen_once_for_each_use() -> None:
    from mue.checks.measure import measure

    plan = mue.transfer(BASE, BASE, TUNED)
    model = LanguageModel(BASE, plan.multipliers)
    plan.init_(model)
    calls: list[int] = []
    model.blocks[0].attention.q.register_forward_hook(lambda *_: calls.append(1))  # ours: hooks are not how it looks
    first = model.blocks[0]
    before = first.forward

    def twice(x: Tensor) -> Any:
        y, _ = before(x)
        return before(y)

    first.forward = twice  # type: ignore[method-assign]
    from mue.checks.trace import traced
    from mue.layouts.of_model import placed

    record, _ = traced(placed(model), 64, lambda: model(batches(-1)[0]))
    uses = [p.info.name for p in record.products if p.info.role == "attention_q"]
    assert uses.count("blocks.0.attention.q.weight") == 2 and uses.count("blocks.1.attention.q.weight") == 1
    assert ("attention q", "update") in measure(model, plan, batches, batches(-1), 2)


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_every_axis_passes(axis: str) -> None:
    found = run(axis)
    assert found.ok, found


@pytest.mark.slow
def test_known_slopes_are_expected_values() -> None:
    """Logits under the published table fall as 1/ρ_d, and that is what is expected; flat ones would fail there."""
    found = run("width", "complete-mue-paper")
    assert found.ok, found
    logits = next(s for s in found.slopes if s.module == "logits")
    assert logits.expected == (-1, -1) and logits.slope < -0.7
    up = next(s for s in run("expansion").slopes if s.quantity.endswith("up and gate"))
    assert up.expected[1] == pytest.approx(0.5)


@pytest.mark.slow
def test_wrong_rules_fail_along_their_axis() -> None:
    assert {s.module for s in run("depth", "standard").failures} >= {"stream"}
    assert not run("expansion", "standard").ok


def grouped(change: Callable[[dict[str, Any]], None]) -> Callable[[mue.Plan, nn.Module], torch.optim.Optimizer]:
    """AdamW of the plan's groups after a change of each."""

    def make(plan: mue.Plan, model: nn.Module) -> torch.optim.Optimizer:
        groups = plan.param_groups(model)
        for g in groups:
            change(g)
        return torch.optim.AdamW(groups)

    return make


def test_weight_decay_is_invisible_to_coordinates() -> None:
    """mup's threads say so; here it is: decay switched off changes no slope, and ``groups`` and ``moved`` see it at once."""
    shapes = [dense(64), dense(128)]
    none = grouped(lambda g: g.update(weight_decay=0.0))
    right, wrong = (run("width", shapes=shapes, steps=4, seeds=(0,), **more) for more in ({}, {"optimizer": none}))
    assert right.ok and wrong.ok
    assert all(abs(a.slope - b.slope) < 0.02 for a, b in zip(right.slopes, wrong.slopes, strict=True))
    plan = mue.transfer(BASE, shapes[1], TUNED)
    model = LanguageModel(shapes[1], plan.multipliers)
    plan.init_(model)
    report = mue.check(model, plan, batches(0), none(plan, model), raises=False)
    assert {f.check for f in report.failures} == {"groups", "moved"}


def tensors_only(hook: Callable[..., None]) -> Callable[..., None]:
    """mup's hook on what it understands of a module's output."""

    def seen(module: nn.Module, given: Any, out: Any) -> None:
        many = out if isinstance(out, tuple) else (out,)
        hook(module, given, tuple(t for t in many if isinstance(t, Tensor)))

    return seen


def dropped_experts(plan: mue.Plan, model: nn.Module) -> torch.optim.Optimizer:
    """The stacked experts are in no group: what a classifier that knows only nn.Linear does."""
    groups = plan.param_groups(model)
    for g in groups:
        g["params"] = [p for p in g["params"] if p.dim() < 3]
    return torch.optim.AdamW([g for g in groups if g["params"]])


@pytest.mark.slow
def test_separates_where_mup_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are never trained. mup's curves (sizes of module outputs) stay where the right ones are; ours fail by name."""
    monkeypatch.setitem(sys.modules, "pandas", types.ModuleType("pandas"))  # imported there, unused in what records
    coord = pytest.importorskip("mup.coord_check")
    shapes = [moe(width=w, expert=w // 2) for w in (64, 128, 256)]

    def build(shape: Transformer) -> nn.Module:
        plan = mue.transfer(BASE, shape, TUNED)
        model = LanguageModel(shape, plan.multipliers)
        plan.init_(model)
        return model

    def mups(make: Callable[[mue.Plan, nn.Module], torch.optim.Optimizer]) -> dict[str, float]:
        """mup's own records of |output| of every module that returns a tensor, as slopes in width."""
        kept: dict[str, list[tuple[float, float]]] = {}
        for shape in shapes:
            model = build(shape)
            optimizer = make(mue.transfer(BASE, shape, TUNED), model)
            for step in range(4):
                records: list[dict[str, Any]] = []
                hooks = [
                    m.register_forward_hook(tensors_only(coord._record_coords(records, shape.width, n, step + 1)))
                    for n, m in model.named_modules()
                    if not isinstance(m, LanguageModel | nn.ModuleList)
                ]
                loss = model(*batches(step)).loss
                for hook in hooks:
                    hook.remove()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for r in records:
                value = [v for k, v in r.items() if k == "l1"]
                if value:
                    kept.setdefault(r["module"], []).append((float(shape.width), float(value[0])))
        return {name: fitted(points)[0] for name, points in kept.items() if len(points) == len(shapes)}

    right, wrong = mups(lambda plan, model: torch.optim.AdamW(plan.param_groups(model))), mups(dropped_experts)
    print(max(abs(right[k] - wrong[k]) for k in right))
    assert right and max(abs(right[k] - wrong[k]) for k in right) < 0.2  # no curve of theirs leaves the right one
    assert run("width", shapes=shapes).ok
    ours = run("width", shapes=shapes, optimizer=dropped_experts)
    assert {s.quantity for s in ours.failures} >= {"change of output by down", "change of output by up and gate"}, ours


@pytest.mark.slow
def test_the_overlay_sees_a_wrong_rate() -> None:
    def losses(shape: Transformer, lr: float = 1.0) -> list[float]:
        plan = mue.transfer(BASE, shape, TUNED).scaled(lr)
        return first_losses(lambda s: LanguageModel(s, plan.multipliers), plan, batches)

    found = {"dense": losses(BASE), "sparse": losses(moe()), "wrong": losses(moe(), 8.0)}
    made = overlay(found, "dense", limit=0.2, raises=False)
    assert [g.ok for g in made.gaps] == [True, False], made
