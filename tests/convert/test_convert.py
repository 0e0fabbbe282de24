"""``mue convert``: training goes on in the other form as if nothing had happened; whatever cannot be right is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

import mue
from mue.checks.subjects.checkpoint import stored_hash
from mue.cli import app
from mue.convert import rewrite
from mue.convert.checkpoint import Report, convert_checkpoint
from mue.convert.forms import Conversion, conversion
from mue.fold import coefficients, fold
from mue.lab.models.language import LanguageModel
from mue.lab.train import checkpoint
from mue.util.safetensors import read_header
from support.precision import close

SIZES: dict[str, Any] = {"head_dim": 4, "vocab": 11, "sequence": 16}
BASE = mue.Dense(width=4, ffn=8, layers=3, **SIZES)
MOE = mue.MoE.parse("4e2a1s", width=12, expert=5, layers=1, shared=5, **SIZES)  # no multiplier is a power of two
TUNED = mue.HParams(lr=4e-3, weight_decay=0.5, init_std=0.3, eps=1e-3)
HALVES = (mue.Dense(width=4, ffn=4, layers=1, **SIZES), mue.MoE.parse("8e2a", width=8, expert=8, layers=2, **SIZES))
K = 12


pytestmark = pytest.mark.usefixtures("in_float64")


def planned(base: mue.Dense = BASE, target: mue.shapes.Transformer = MOE, **changes: Any) -> mue.Plan:
    return mue.transfer(base, target, TUNED.replace(**changes))


def how(plan: mue.Plan, form: str, route: str = "weights") -> Conversion:
    with torch.device("meta"):
        return conversion(plan, form, LanguageModel(plan.target, plan.multipliers), route)


class Run:
    """A training run of the lab's model in one form, with a schedule; ``to`` saves and ``load`` goes on."""

    def __init__(self, plan: mue.Plan, seed: int | None = 0) -> None:
        self.plan = plan
        self.model = LanguageModel(plan.target, plan.multipliers, balance="none")
        if seed is not None:
            plan.init_(self.model, seed)
        self.optimizer = torch.optim.AdamW(plan.param_groups(self.model), amsgrad=True)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / 40)

    def train(self, start: int, steps: int) -> None:
        for step in range(start, start + steps):
            x = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            logits = self.model(x[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
            self.optimizer.step()
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return {
            "plan": self.plan.hash,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": K,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def distance(one: Run, two: Run) -> float:
    """Largest relative difference of effective weights."""
    found = []
    c = [coefficients(r.plan, r.model) for r in (one, two)]
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        a, b = p.detach() / c[0][p], q.detach() / c[1][q]
        found.append(float((a - b).abs().max() / a.abs().max()))
    return max(found)


# ---- training goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["folded", "multipliers"])
def test_a_torch_file_trains_on_identically(form: str, tied: bool, tmp_path: Path) -> None:
    plan = planned(replace(BASE, tied=tied), replace(MOE, tied=tied))
    first, second = (plan, fold(plan)) if form == "folded" else (fold(plan), plan)
    straight, one, two = Run(first), Run(first), Run(second, seed=None)
    straight.train(0, 2 * K)
    one.train(0, K)
    torch.save(one.state(), tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, form))
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (state["plan"], state["mue"]["form"], state["step"]) == (second.hash, form, K)
    assert stored_hash(tmp_path / "b.pt") == second.hash  # mue check --checkpoint knows it
    two.load(state)
    two.train(K, K)
    assert distance(straight, two) < 1e-12
    control = Run(second, seed=None)  # without the optimizer's state it is another training
    control.load({**state, "optimizer": {**state["optimizer"], "state": {}}})
    control.train(K, K)
    assert distance(straight, control) > 1e-4


def test_the_labs_checkpoint_trains_on_identically(tmp_path: Path) -> None:
    plan = planned()
    folded = fold(plan)
    straight, one, two = Run(plan), Run(plan), Run(folded, seed=None)
    straight.train(0, 2 * K)
    one.train(0, K)
    checkpoint.save(tmp_path / "a.safetensors", one.model, one.optimizer, {"run": "r", "plan": plan.hash, "step": K})
    plan.save(tmp_path / "plan.json")
    command = ["convert", "a.safetensors", "--plan", "plan.json", "--to", "folded", "--out", "b.safetensors"]
    done = run(command, tmp_path)
    assert done.exit_code == 0 and "stored weights scaled" in done.output
    state = checkpoint.load(tmp_path / "b.safetensors", two.model, two.optimizer, run="r", plan=folded.hash)
    assert state["step"] == K and state["form"] == "folded"
    for group in two.optimizer.param_groups:
        group["lr"] *= 1 - K / 40
    two.scheduler.last_epoch = K
    two.train(K, K)
    assert distance(straight, two) < 1e-12


@pytest.mark.parametrize("names", ["param_names", "keys"])
def test_optimizers_that_know_their_parameters_by_name(names: str, tmp_path: Path) -> None:
    """As torch keeps them (``param_names``) and as torch.distributed.checkpoint does (names as keys), in any grouping."""
    plan = planned()
    one = Run(plan)
    named = {p: n for n, p in one.model.named_parameters()}
    groups = []
    for g in plan.param_groups(one.model):  # one group for each parameter, in another order than the plan's
        groups += [{**g, "params": [p], "param_names": [named[p]]} for p in reversed(g["params"])]
    one.optimizer = torch.optim.AdamW(groups, amsgrad=True)
    one.scheduler = LambdaLR(one.optimizer, lambda step: 1 - step / 40)
    one.train(0, K)
    state = one.optimizer.state_dict()
    if names == "keys":
        order = [n for g in state["param_groups"] for n in g["param_names"]]
        state = {
            "state": {order[i]: s for i, s in state["state"].items()},
            "param_groups": [
                {**{k: v for k, v in g.items() if k != "param_names"}, "params": g["param_names"]}
                for g in state["param_groups"]
            ],
        }
    torch.save(state, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))
    new = torch.load(tmp_path / "b.pt", weights_only=True)
    folded, two = fold(plan), Run(fold(plan))
    assert [g["lr"] for g in new["param_groups"]] == pytest.approx(
        [g["lr"] * (1 - K / 40) for g in folded.param_groups(two.model)], rel=1e-12
    )
    c = {named[p]: v for p, v in zip(named, coefficients(folded, two.model).values(), strict=True)}
    held = [n for g in new["param_groups"] for n in g["params" if names == "keys" else "param_names"]]
    assert sorted(held) == sorted(named.values())
    for n, p in one.model.named_parameters():
        moved = new["state"][n if names == "keys" else held.index(n)]["exp_avg_sq"]
        assert close(moved, one.optimizer.state[p]["exp_avg_sq"] / c[n] ** 2, operations=4)
        assert not close(
            moved, one.optimizer.state[p]["exp_avg_sq"] / (1.01 * c[n]) ** 2, operations=4
        )  # nor both zero


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
def test_there_and_back_is_exact_for_powers_of_two_and_to_rounding_otherwise(
    exact: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    plan = planned(*HALVES) if exact else planned()
    model = LanguageModel(plan.target, plan.multipliers).to(dtype)
    plan.init_(model)
    checkpoint.save_weights(tmp_path / "a.safetensors", model, {"kept": "text"})
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", how(plan, "folded"))
    convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c.safetensors", how(plan, "multipliers"))
    a, b, c = (load_file(tmp_path / f"{n}.safetensors") for n in "abc")
    own = coefficients(fold(plan), LanguageModel(plan.target, fold(plan).multipliers))
    scaled = {n for (n, _), v in zip(model.named_parameters(), own.values(), strict=True) if v != 1}
    for name, _ in model.named_parameters():
        assert torch.equal(a[name], b[name]) == (name not in scaled), name
        gone = (a[name].double() - c[name].double()).abs().max() / a[name].double().abs().max()
        # Half precision loses bits of numbers below 6e-5 even to a factor of two.
        assert float(gone) == 0 if exact and dtype != torch.float16 else float(gone) <= torch.finfo(dtype).eps, name
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mue"])["form"] == "folded"


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "F16", "BF16"]), st.integers(0, 300)), min_size=1, max_size=5
    ),
    chunk=st.integers(1, 40),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_streaming_is_the_function_on_every_tensor(
    sizes: list[tuple[str, int]], chunk: int, metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    tensors = {f"t{i}": torch.randn(n).to(rewrite._TYPES[kind]) for i, (kind, n) in enumerate(sizes)}
    save_file(tensors, folder / "a.safetensors", {"old": "1"})
    seen: list[int] = []

    def half(values: Tensor) -> Tensor:
        seen.append(values.numel() * values.element_size())
        return values / 2

    before, rewrite.CHUNK = rewrite.CHUNK, 8 * chunk
    try:
        rewrite.rewrite(
            folder / "a.safetensors", folder / "b.safetensors", lambda n: None if n == "t0" else half, metadata
        )
    finally:
        rewrite.CHUNK = before
    new = load_file(folder / "b.safetensors")
    assert all(torch.equal(new[n], t if n == "t0" else t / 2) for n, t in tensors.items()) and set(new) == set(tensors)
    assert read_header(folder / "b.safetensors").metadata == metadata
    assert all(n <= 8 * chunk for n in seen)  # never more than a chunk at once


# ---- refusals --------------------------------------------------------------------------------------------------------


def run(arguments: list[str], folder: Path) -> Any:
    paths = {a: str(folder / a) for a in arguments if "." in a or a in ("in", "out")}
    return CliRunner().invoke(app, [paths.get(a, a) for a in arguments])


def weights(plan: mue.Plan) -> dict[str, Tensor]:
    model = LanguageModel(plan.target, plan.multipliers)
    return {n: t.contiguous() for n, t in model.state_dict().items()}


def test_converting_twice_or_under_another_plan_is_refused(tmp_path: Path) -> None:
    plan = planned()
    save_file(weights(plan), tmp_path / "a.safetensors")
    torch.save(weights(plan), tmp_path / "a.pt")
    for kind in ("safetensors", "pt"):
        a, b = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
        convert_checkpoint(a, b, how(plan, "folded"))
        with pytest.raises(ValueError, match="is in the folded form already: converting twice would scale it twice"):
            convert_checkpoint(b, tmp_path / "c", how(plan, "folded"))
        with pytest.raises(ValueError, match=rf"belongs to plan {fold(plan).hash}; this is plan"):
            convert_checkpoint(b, tmp_path / "c", how(plan.scaled(2), "multipliers"))
        with pytest.raises(ValueError, match="exists already"):
            convert_checkpoint(a, b, how(plan, "folded"))
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    LanguageModel(plan.target, fold(plan).multipliers).load_state_dict(loaded)  # the mark is not among the weights


def test_a_checkpoint_of_another_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plan = planned()
    every = weights(plan)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": ({n: t for n, t in every.items() if "experts_down" not in n}, "lacks 1 parameters .*experts_down"),
        "unknown": ({**every, "strange.weight": torch.ones(2)}, r"strange\.weight is in the checkpoint and not in"),
        "quantised": (
            {n: t.to(torch.float8_e4m3fn) if "down" in n else t for n, t in every.items()},
            "dequantise it first",
        ),
        "overflow": (
            {n: torch.full_like(t, 6e4, dtype=torch.float16) if "head" in n else t for n, t in every.items()},
            "is more than torch.float16 holds",
        ),
    }
    for name, (tensors, message) in cases.items():
        form = "multipliers" if name == "overflow" else "folded"
        for kind in ("safetensors", "pt"):
            path, out = tmp_path / f"{name}.{kind}", tmp_path / "out" / f"{name}.{kind}"
            save_file(tensors, path) if kind == "safetensors" else torch.save({"model": tensors}, path)
            with pytest.raises(ValueError, match=message):
                convert_checkpoint(path, out, how(plan, form))
            assert not out.parent.exists()
    torch.save({"step": 3}, tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="holds neither weights nor optimizer state"):
        convert_checkpoint(tmp_path / "nothing.pt", tmp_path / "o.pt", how(plan, "folded"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "missing.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged: its tensors end at byte"):
        convert_checkpoint(tmp_path / "cut.safetensors", tmp_path / "o.safetensors", how(plan, "folded"))
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="dcp_to_torch"):
        convert_checkpoint(tmp_path / "dcp", tmp_path / "o", how(plan, "folded"))


def test_an_optimizer_that_is_not_the_plans_is_refused(tmp_path: Path) -> None:
    plan = planned()
    one = Run(plan)
    one.train(0, 1)

    def refused(optimizer: dict[str, Any], message: str) -> None:
        torch.save({"optimizer": optimizer}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))

    plain = torch.optim.AdamW(one.model.parameters(), lr=1e-3)
    refused(plain.state_dict(), "have no names, and its groups of .* are not those of plan.param_groups")
    state = one.optimizer.state_dict()
    state["param_groups"][0]["weight_decay"] = 3.0
    refused(state, r"has weight_decay = 3\.0, the plan")
    state = one.optimizer.state_dict()
    state["param_groups"][1]["lr"] /= 2  # one group at another phase; o and q part from each other when folded
    down = next(i for i, g in enumerate(state["param_groups"]) if "expert_down" in g["roles"])
    assert len(state["param_groups"][down]["params"]) > 1
    state = one.optimizer.state_dict()
    order = [i for g in state["param_groups"] for i in g["params"]]
    state["state"] = {i: state["state"][order[-1 - k]] for k, i in enumerate(order)}
    refused(state, "parameters are in another order than plan.param_groups")
    state = one.optimizer.state_dict()
    state["state"][down]["prodigy_d"] = torch.ones(())
    for s in state["state"].values():
        s["prodigy_d"] = torch.ones(())
    refused(state, r"'prodigy_d' is not in mue\.fold\.FOLDS")


def test_a_schedulers_absolute_rates_are_the_new_forms(tmp_path: Path) -> None:
    from mue.convert.optimizer import convert_scheduler

    plan = planned()
    one = Run(plan)
    one.train(0, 3)
    torch.save(one.state(), tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))
    new = torch.load(tmp_path / "b.pt", weights_only=True)
    groups = new["optimizer"]["param_groups"]
    assert len(groups) != len(one.optimizer.param_groups)  # the folded form parts what was one group
    assert new["scheduler"]["base_lrs"] == [g["initial_lr"] for g in groups]
    assert new["scheduler"]["_last_lr"] == [g["lr"] for g in groups]
    old = one.optimizer.param_groups
    with pytest.raises(ValueError, match="min_lrs has one entry for each group"):
        convert_scheduler({"base_lrs": [], "min_lrs": [1e-5] * len(old)}, old, groups)


def test_the_report_says_what_was_scaled(tmp_path: Path) -> None:
    plan = planned()
    save_file(weights(plan), tmp_path / "a.safetensors")
    report = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", how(plan, "folded"))
    c = coefficients(fold(plan), LanguageModel(plan.target, fold(plan).multipliers))
    assert isinstance(report, Report)
    assert report.changed == sum(not math.isclose(v, 1) for v in c.values()) > 2
    assert report.met == {n for n, _ in LanguageModel(plan.target, plan.multipliers).named_parameters()}
