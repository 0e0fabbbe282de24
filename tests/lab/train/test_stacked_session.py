"""Stacked variants: the same numbers as separate runs, no variant touches another, one optimizer step for all."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mue
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.sweep.spec import base_plan
from mue.lab.train.run import Run, Settings
from mue.lab.train.session import TrainingSession
from mue.lab.train.stacked_session import StackedSession, adamw_, stack_kind
from support.precision import close, rounding

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
SHAPES = {
    "dense": BASE,
    "tied, grouped heads, no gate": mue.Dense(
        32, 48, 2, head_dim=8, kv_heads=2, sequence=32, tied=True, gated=False
    ),
    "moe": mue.MoE.parse("8e2a1s", width=32, expert=16, layers=2, head_dim=16, sequence=32),
    "groups, softmax": mue.MoE.parse("8e4a2g", width=32, expert=16, layers=1, head_dim=16, sequence=32, router="softmax"),
    "a pool": mue.MoE.parse("8e2a1p", width=32, expert=16, layers=2, head_dim=16, sequence=32),
    "shared only": mue.MoE.parse("2s", width=32, expert=16, layers=1, head_dim=16, sequence=32),
}  # fmt: skip
STEPS = 8
# Of the steps forward and back: two layers, each with products over up to 32 + 3 · 48 and sums over 32 tokens, and the head's.
OPERATIONS = STEPS * 2 * (2 * (4 * 32 + 3 * 48 + 2 * 32) + 32)
BOUND = rounding(torch.float32, OPERATIONS)


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def variants(corpus: Corpus, shape: mue.Dense | mue.MoE, balance: str = "bias", muon: str = "") -> list[Run]:
    """Runs of one kind that differ in everything that may differ. ``muon``: they train with it, in this convention."""
    rows = [
        (0.01, 0.1, 0.1, (0.9, 0.95), None, 0, STEPS),
        (0.03, 0.0, 0.05, (0.8, 0.99), 0.5, 1, STEPS),
        (0.002, 1.0, 0.2, (0.9, 0.999), 2.0, 0, 2 * STEPS),
    ]
    runs = []
    for lr, decay, std, betas, clip, seed, steps in rows:
        tuned = mue.HParams(
            lr=lr, weight_decay=decay, init_std=std, betas=betas, clip=clip, z=1e-2, bias_speed=lr,
            balance=0.02 if balance == "loss" else 0.0,
        )  # fmt: skip
        if muon:
            tuned = tuned.replace(optimizer="muon", update_scale=muon, adamw_lr=2 * lr, momentum=betas[1])
        training = mue.Training(128, steps)
        plan = mue.transfer(BASE, shape, tuned, base_training=training, training=training)
        runs.append(
            Run(
                plan,
                Settings(seed=seed, balance=balance, eval_every=3, eval_sequences=8, log_every=1),
                describe_data({}, corpus),
            )
        )
    return runs


def session(run: Run, folder: Path, corpus: Corpus, dtype: torch.dtype) -> TrainingSession:
    folder.mkdir(parents=True)
    made = TrainingSession(run, folder, corpus)
    made.model.to(dtype)
    return made


def alone(runs: list[Run], root: Path, corpus: Corpus, dtype: torch.dtype, steps: int = STEPS) -> list[TrainingSession]:
    out = []
    for i, run in enumerate(runs):
        with session(run, root / str(i), corpus, dtype) as made:
            for _ in range(steps):
                made.train_step()
        out.append(made)
    return out


def together(
    runs: list[Run], root: Path, corpus: Corpus, dtype: torch.dtype, size: int, joins: list[int], compiled: bool = False
) -> list[TrainingSession]:
    """Run ``i`` joins after ``joins[i]`` steps of the stack, and leaves after STEPS of its own."""
    with ExitStack() as open_:
        sessions = [open_.enter_context(session(run, root / str(i), corpus, dtype)) for i, run in enumerate(runs)]
        stack = StackedSession(sessions[0], size, compiled=compiled)
        while any(c.step < STEPS for c in sessions):
            for i, c in enumerate(sessions):
                if joins[i] == 0:
                    stack.put(stack.sessions.index(None), c)
                joins[i] -= 1
            if stack.occupied:
                stack.step()
            for place, c in stack.occupied:
                if c.step == STEPS:
                    c.weights = {k: v.clone() for k, v in c.model.state_dict().items()}
                    stack.drop(place)
    return sessions


def rows(c: TrainingSession) -> list[dict[str, object]]:
    return [json.loads(line) for line in (c.folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: TrainingSession, other: TrainingSession, tolerance: float) -> None:
    assert len(rows(one)) == len(rows(other)) > 0
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for name in ("load", "routers"):  # nested; in six digits, which 1e-10 does not reach
            assert a.pop(name, None) == b.pop(name, None)
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance)


def assert_all_same(separate: list[TrainingSession], stacked: list[TrainingSession], tolerance: float) -> None:
    """Every run's rows to ``tolerance``, and its weights, in which a run's differences add up, to a hundred times that."""
    for one, other in zip(separate, stacked, strict=True):
        assert_same(one, other, tolerance)
        for key, value in one.model.state_dict().items():
            torch.testing.assert_close(other.weights[key], value, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "balance"), [*((name, "bias") for name in SHAPES), ("moe", "loss")])
def test_a_stack_gives_the_losses_of_separate_runs(tmp_path: Path, corpus: Corpus, name: str, balance: str) -> None:
    """float64, to 1e-10: losses, gradient norms, validation, expert load; with other seeds, betas, clipping, lengths."""
    runs = variants(corpus, SHAPES[name], balance)
    separate = alone(runs, tmp_path / "alone", corpus, torch.float64)
    stacked = together(runs, tmp_path / "stacked", corpus, torch.float64, 3, [0, 0, 0])
    assert_all_same(separate, stacked, 1e-10)


@pytest.mark.parametrize(("name", "scale"), [("moe", "spectral"), ("tied, grouped heads, no gate", "keller")])
def test_a_stack_of_muon_gives_the_losses_of_separate_runs(
    tmp_path: Path, corpus: Corpus, name: str, scale: str
) -> None:
    """Matrices of all variants, layers and experts orthogonalised together are those that each run has alone."""
    runs = variants(corpus, SHAPES[name], muon=scale)
    separate = alone(runs, tmp_path / "alone", corpus, torch.float64)
    stacked = together(runs, tmp_path / "stacked", corpus, torch.float64, 3, [0, 0, 0])
    assert_all_same(separate, stacked, 1e-9)
    plain = variants(corpus, SHAPES[name])
    assert len({stack_kind(run) for run in runs}) == 1 and stack_kind(plain[0]) != stack_kind(runs[0])
    with pytest.raises(AssertionError):  # the control: momentum is one that a run has alone
        assert_same(separate[0], stacked[1], 1e-9)


@pytest.mark.parametrize("muon", ["", "match-rms"])
def test_runs_join_and_leave_between_steps(tmp_path: Path, corpus: Corpus, muon: str) -> None:
    """Two places for three runs: the third joins when one leaves, and each run is where it would be alone."""
    runs = variants(corpus, SHAPES["moe"], muon=muon)
    separate = alone(runs, tmp_path / "alone", corpus, torch.float64)
    stacked = together(runs, tmp_path / "stacked", corpus, torch.float64, 2, [0, 5, STEPS])
    for one, other in zip(separate, stacked, strict=True):
        assert_same(one, other, 1e-10)


@pytest.mark.parametrize("change", [{"lr": 0.011}, {"weight_decay": 0.2}, {"betas": (0.9, 0.96)}, {"seed": 3}])
def test_control_a_variant_of_other_settings_is_seen(tmp_path: Path, corpus: Corpus, change: dict[str, object]) -> None:
    """The comparison can fail: one setting of one variant a little off."""
    runs = variants(corpus, BASE)
    other = dict(change)
    shifted = replace(runs[0].settings, seed=other.pop("seed", 0))
    plan = base_plan(BASE, runs[0].plan.training, runs[0].plan.tuned.replace(**other))
    (one,) = alone(runs[:1], tmp_path / "alone", corpus, torch.float64)
    stacked = together(
        [Run(plan, shifted, runs[0].data), *runs[1:]], tmp_path / "stacked", corpus, torch.float64, 3, [0, 0, 0]
    )
    with pytest.raises(AssertionError):
        assert_same(one, stacked[0], 1e-10)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_diverged_variant_costs_its_neighbours_nothing(tmp_path: Path, corpus: Corpus, name: str) -> None:
    """Weights of one variant become infinite and NaN: the others' metrics and weights are what they would be."""
    runs = variants(corpus, SHAPES[name])

    def trained(spoil: float | None) -> list[TrainingSession]:
        root = tmp_path / str(spoil)
        with ExitStack() as open_:
            sessions = [
                open_.enter_context(session(run, root / str(i), corpus, torch.float32)) for i, run in enumerate(runs)
            ]
            stack = StackedSession(sessions[0], 3)
            for place, c in enumerate(sessions):
                stack.put(place, c)
            for step in range(STEPS):
                if step == 3 and spoil is not None:
                    with torch.no_grad():
                        for p in sessions[1].model.parameters():
                            p.fill_(spoil)
                if step == 6 and spoil is not None:
                    assert sessions[1].status == "diverged"
                    assert not math.isfinite(sessions[1].loss)
                    stack.drop(1)
                stack.step()
        return sessions

    clean = trained(None)
    for spoil in (math.nan, math.inf):
        spoiled = trained(spoil)
        for i in (0, 2):
            assert_same(spoiled[i], clean[i], BOUND)
            for key, value in clean[i].model.state_dict().items():
                assert close(spoiled[i].model.state_dict()[key], value, operations=OPERATIONS), key
        with pytest.raises(AssertionError):  # the control: the spoiling was real
            assert_same(spoiled[1], clean[1], BOUND)
    wrong = clean[0].model.state_dict()["head.weight"].clone()
    wrong[3] *= 1.01  # the control: a weight's rows off by 1 %
    assert not close(wrong, clean[0].model.state_dict()["head.weight"], operations=OPERATIONS)


def test_single_precision_agrees_to_rounding(tmp_path: Path, corpus: Corpus) -> None:
    runs = variants(corpus, BASE)
    for one, other in zip(
        alone(runs, tmp_path / "alone", corpus, torch.float32),
        together(runs, tmp_path / "stacked", corpus, torch.float32, 3, [0, 0, 0]),
        strict=True,
    ):
        assert_same(one, other, 2e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_adamw_is_torchs(data: st.DataObject) -> None:
    """Three variants of two tensors with settings of their own against three optimizers, some steps, float64."""
    variants, tensors, size = 3, 2, 5
    number = lambda low, high: data.draw(st.floats(low, high))  # noqa: E731
    lr, decay, eps = (
        [[number(*span) for _ in range(variants)] for _ in range(tensors)] for span in ((0, 0.1), (0, 1), (1e-12, 1e-3))
    )
    betas = [(number(0, 0.99), number(0, 0.999)) for _ in range(variants)]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(tensors, variants, size, dtype=torch.float64)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    own = [[nn.Parameter(weight[i, v].clone()) for i in range(tensors)] for v in range(variants)]
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p], "lr": lr[i][v], "weight_decay": decay[i][v], "eps": eps[i][v]}
                for i, p in enumerate(own[v])
            ],
            betas=betas[v],
        )
        for v in range(variants)
    ]
    setting = [torch.tensor(x, dtype=torch.float64)[:, :, None] for x in (lr, decay, eps)]
    beta1, beta2 = torch.tensor(betas, dtype=torch.float64).T[:, :, None]
    for step in range(1, 4):
        grad = torch.randn_like(weight)
        for v, optimizer in enumerate(optimizers):
            for i, p in enumerate(own[v]):
                p.grad = grad[i, v].clone()
            optimizer.step()
        adamw_(weight, grad, mean, square, *setting, beta1, beta2, 1 - beta1**step, 1 - beta2**step)
    for v in range(variants):
        for i, p in enumerate(own[v]):
            torch.testing.assert_close(weight[i, v], p.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(square[i, v], optimizers[v].state[p]["exp_avg_sq"], rtol=1e-12, atol=1e-14)


def test_kinds_of_runs(corpus: Corpus) -> None:
    runs = variants(corpus, BASE)
    assert len({stack_kind(run) for run in runs}) == 1
    moe = variants(corpus, SHAPES["moe"])[0]
    halves = replace(runs[0], settings=replace(runs[0].settings, precision="bf16"))
    longer = mue.Training(256, STEPS)
    batch = Run(base_plan(BASE, longer, runs[0].plan.tuned), runs[0].settings, runs[0].data)
    assert len({stack_kind(run) for run in (runs[0], moe, halves, batch)}) == 4


@pytest.mark.slow
def test_a_compiled_stack_agrees(tmp_path: Path, corpus: Corpus) -> None:
    runs = variants(corpus, BASE)
    separate = alone(runs, tmp_path / "alone", corpus, torch.float64)
    stacked = together(runs, tmp_path / "stacked", corpus, torch.float64, 2, [0, 5, STEPS], compiled=True)
    for one, other in zip(separate, stacked, strict=True):
        assert_same(one, other, 1e-9)
