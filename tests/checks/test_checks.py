"""mue.check: right models pass untouched, seeded faults are caught and named, and every way of using it works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mue
from mue.checks import CHECKS, CheckError, Finding
from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.subjects.checkpoint import stored_hash
from mue.lab.models.language import LanguageModel
from support.wiring_cases import BASE, OURS, TUNED, case
from support.wiring_faults import broken, load

# The whole table is `make slow` and benchmarks/mutations.py; these are one or two of each check.
FAULTS = load()
SAMPLE = (
    "output multiplier missing in one layer",
    "output multiplier on the routed sum only",
    "route scale missing",
    "shared expert scaled by R",
    "residual multiplier on the stream instead of the branch",
    "head multiplier only where no targets are given",
    "tied embedding scaled twice",
    "attention scale applied twice",
    "swapped gate and up",
    "softmax without renormalisation",
    "renormalised per group instead of globally",
    "experts in another order than the router's rows",
    "balance bias in the weights",
    "wrong fan-in axis for fused experts",
    "one expert of N left at default init",
    "all experts from one draw",
    "router at base lr",
    "weight decay on norms",
    "eps unscaled",
    "stacked experts filtered out of the optimizer",
    "scheduler that writes absolute lr",
    "cosine floor as an absolute lr",
    "frozen experts",
    "one expert of N never trained",
    "bf16 parameters that never move",
    "stale plan: another granularity",
    "tied head untied by a copy",
    "checkpoint of another plan",
)
UNSEEN = {"loss summed over tokens instead of averaged"}  # AdamW's first step does not know the gradient's scale
MINE = [(n, f) for n, fault in FAULTS.items() for f in fault.families if f in OURS]


def judge(name: str, family: str) -> None:
    report = broken(name, family).check()
    assert not report.ok, report
    named = [f for f in report.failures if re.search(FAULTS[name].culprit, f.where)]
    assert named, report
    assert all(f.expected and f.measured and f.causes and f.mend for f in named), named


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_is_caught_and_named(name: str) -> None:
    judge(name, next(f for f in FAULTS[name].families if f in OURS))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [m for m in MINE if m[0] not in UNSEEN and m[0] not in SAMPLE])
def test_every_fault_is_caught_and_named(name: str, family: str) -> None:
    judge(name, family)


def test_there_are_at_least_forty_faults() -> None:
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("family", OURS)
def test_right_models_pass_and_stay_what_they_were(family: str) -> None:
    for seed in range(3):
        c = case(family, seed)
        before = {n: t.detach().clone() for n, t in c.model.state_dict().items()}
        modes = [m.training for m in c.model.modules()]
        rates = [g["lr"] for g in c.optimizer.param_groups]
        schedule = json.dumps(c.scheduler.state_dict(), default=str)
        report = c.check()
        assert report.ok and not report.warnings, report
        assert all(torch.equal(t, before[n]) for n, t in c.model.state_dict().items())
        assert modes == [m.training for m in c.model.modules()]
        assert rates == [g["lr"] for g in c.optimizer.param_groups] and not c.optimizer.state
        assert json.dumps(c.scheduler.state_dict(), default=str) == schedule
        assert all(p.grad is None for p in c.model.parameters())


def test_it_raises_with_the_name_and_the_mend() -> None:
    c = broken("router at base lr", "mue hybrid")
    with pytest.raises(CheckError, match=r"router\.weight.*: lr") as caught:
        mue.check(c.model, c.plan, c.batch, c.optimizer)
    assert isinstance(caught.value, ValueError)
    assert "mend it: optimizer = torch.optim.AdamW(plan.param_groups(model))" in str(caught.value)
    assert "likeliest cause" in str(caught.value)
    assert caught.value.report.failures


def test_multipliers_are_measured_to_many_digits() -> None:
    from mue.checks.context import Context

    c = case("mue hybrid")
    parts = Context(c.model, c.plan, c.batch).parts
    A, R, residual = c.plan.output_multiplier, c.plan.route_scale, c.plan.residual_multiplier
    assert len(parts) == c.plan.target.layers
    for found in parts.values():
        assert found is not None and found.activation == "silu" and not found.swapped
        assert found.routed.sum(1).tolist() == pytest.approx([A * R * residual] * found.routed.shape[0], rel=1e-4)
        assert found.single.tolist() == pytest.approx([A * residual] * found.routed.shape[0], rel=1e-4)
        assert found.active.sum(1).tolist() == [4] * found.routed.shape[0]


def test_experts_without_tokens_are_no_failure() -> None:
    shape = mue.MoE.parse("32e2a", width=64, expert=16, layers=2, head_dim=32, sequence=8, vocab=64)
    plan = mue.transfer(BASE, shape, TUNED)
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (1, 6))
    report = mue.check(model, plan, (tokens, tokens))
    text = next(f.measured for f in report.findings if f.check == "moved")
    assert re.search(r"\d+ experts got no token", text)


def test_one_active_expert_is_a_warning_about_its_router() -> None:
    shape = mue.MoE.parse("4e1a", width=64, expert=32, layers=1, head_dim=32, sequence=16, vocab=64)
    plan = mue.transfer(BASE, shape, TUNED)
    with pytest.warns(UserWarning, match="one active expert"):
        model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    report = mue.check(model, plan, (tokens, tokens))
    assert any("router" in f.where for f in report.warnings)


def test_shapes_alone_are_checked_on_the_meta_device() -> None:
    shape = mue.MoE.parse("256e8a1s", width=7168, expert=2048, layers=61, head_dim=128, sequence=16, vocab=129_280)
    plan = mue.transfer(mue.Dense(256, 1024, 8, head_dim=128), shape, TUNED)
    with torch.device("meta"):
        model = LanguageModel(shape, plan.multipliers)
    assert sum(p.numel() for p in model.parameters()) > 6e11
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    report = mue.check(model, plan, optimizer=optimizer)
    assert {f.check for f in report.findings if f.status == "pass"} >= {"coverage", "groups", "gates", "tied weights"}
    optimizer.param_groups[0]["lr"] *= 2
    model.blocks[3].moe.router.route_scale = 1.0
    found = mue.check(model, plan, optimizer=optimizer, raises=False)
    assert {f.check for f in found.failures} == {"groups", "gates"}
    assert any("blocks.3.moe.router.weight" in f.where for f in found.failures)


def test_wrapped_and_bf16_models_are_measured_too() -> None:
    c = case("mue hybrid").low()
    report = c.check(skip=["moved"])  # in bf16 some gains do not move: a finding of its own
    assert report.ok, report
    wrapper = torch.nn.Module()
    wrapper.module = case("mue hybrid").model
    wrapper.forward = lambda *args: wrapper.module(*args)  # type: ignore[method-assign]
    assert mue.check(wrapper, c.plan, c.batch).ok


def test_clipping_is_warned_of_where_it_cannot_be_measured(tmp_path: Path) -> None:
    from mue.fold import fold

    shape = OURS["mue hybrid"]
    plan = fold(mue.transfer(BASE, shape, TUNED.replace(clip=1.0)))
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    assert [f.check for f in mue.check(model, plan, (tokens, tokens)).warnings] == ["clipping"]
    plain = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
    with pytest.raises(CheckError, match="the norm is that of the folded gradients"):
        mue.check(model, plan, (tokens, tokens), clip=plain)


def test_plan_hashes_are_found_in_every_kind_of_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plan = case("mue hybrid").plan
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"mue": json.dumps({"run": "r", "plan": plan.hash})})
    torch.save({"plan": plan.hash, "w": torch.zeros(2)}, tmp_path / "b.pt")
    plan.save(tmp_path / "plan.json")
    for name in ("a.safetensors", "b.pt", "plan.json", "."):
        assert stored_hash(tmp_path / name) == plan.hash, name
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    assert stored_hash(tmp_path / "c.safetensors") is None
    (tmp_path / "d.safetensors").write_bytes(b"xx")
    c = case("mue hybrid")
    c.checkpoint = tmp_path / "d.safetensors"
    assert any("cannot be read" in f.measured for f in c.check(only=["plan hash"]).failures)


def test_what_cannot_run_is_a_finding_and_not_a_crash() -> None:
    c = case("mue hybrid")
    c.batch = (torch.zeros(2, 1000, dtype=torch.long),)
    report = c.check()
    assert [f.check for f in report.failures] == ["multipliers"] and "built for 32" in report.failures[0].measured
    with pytest.raises(ValueError, match="did you mean 'groups'"):
        c.check(only=["group"])


BUILD = """
import torch, mue
from mue.lab.models.language import LanguageModel

def build(plan):
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    return {"model": model, "batch": (tokens, tokens), "optimizer": optimizer}

def wrong(plan):
    made = build(plan)
    made["model"].blocks[0].moe.router.route_scale = 1.0
    return made
"""


def test_the_command_prints_json_and_fails_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from mue.cli import app

    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(BUILD)
    case("mue hybrid").plan.save("plan.json")
    right = CliRunner().invoke(app, ["check", "mine.py:build", "plan.json"])
    assert right.exit_code == 0 and "multipliers" in right.stdout
    wrong = CliRunner().invoke(app, ["check", "mine.py:wrong", "plan.json", "--json"])
    found = json.loads(wrong.stdout)
    assert wrong.exit_code == 1 and not found["ok"]
    assert any(
        "experts_down" in f["where"] and "route scale R = 4 is missing" in f["causes"] for f in found["findings"]
    )
    with pytest.raises(ValueError, match=r"mine\.py has no 'rong'; did you mean 'wrong'"):
        CliRunner().invoke(app, ["check", "mine.py:rong", "plan.json"], catch_exceptions=False)


def test_public_names() -> None:
    assert mue.check is mue.checks.check and mue.coordinate_check is mue.checks.coordinate_check
    assert len(mue.__all__) < 20


def test_a_check_from_outside_is_one_function() -> None:
    """Registered, it runs in its turn, can be asked for alone, and is left out with the reason where something is lacking."""

    def narrow(limit: int) -> Callable[[Context], Iterator[Finding]]:
        def run(ctx: Context) -> Iterator[Finding]:
            wide = [p.name for p in ctx.placed if p.role == "embedding" and p.fan_out > limit]
            yield Finding("narrow", "fail" if wide else "pass", *wide, measured=f"limit {limit}")

        return run

    c = case("mue hybrid")
    try:
        for limit, ok in ((10_000, True), (1, False)):
            CHECKS._entries.pop("narrow", None)
            check_of("narrow", needs=("roles",))(narrow(limit))
            assert list(CHECKS)[-1] == "narrow"
            report = mue.check(c.model, c.plan, only=["narrow"], raises=False)
            assert report.ok is ok and [f.check for f in report.findings] == ["narrow"]
            assert "narrow" in {f.check for f in mue.check(c.model, c.plan, raises=False).findings}
        CHECKS._entries.pop("narrow")
        check_of("narrow", needs=("roles", "batch"))(narrow(1))
        (left_out,) = mue.check(c.model, c.plan, only=["narrow"]).findings
        assert (left_out.status, left_out.measured) == ("not measured", "no batch was given")
    finally:
        CHECKS._entries.pop("narrow", None)
    with pytest.raises(ValueError, match="unknown check 'narrow'"):
        mue.check(c.model, c.plan, only=["narrow"])
    with pytest.raises(ValueError, match="unknown need 'roels'; did you mean 'roles'"):
        check_of("narrow", needs=("roels",))
