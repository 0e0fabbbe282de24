"""``mue convert`` on a checkpoint: training goes on in the other form as if nothing had happened; what cannot be right is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mue.checks.subjects.checkpoint import stored_hash
from mue.convert.checkpoint import ConversionReport, convert_checkpoint
from mue.fold import coefficients, fold
from mue.lab.models.language import LanguageModel
from mue.lab.train import checkpoint
from support.checkpoints import BASE, HALVES, MOE, K, Run, distance, how, planned, run, weights

pytestmark = pytest.mark.usefixtures("in_float64")


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


def test_the_report_says_what_was_scaled(tmp_path: Path) -> None:
    plan = planned()
    save_file(weights(plan), tmp_path / "a.safetensors")
    report = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", how(plan, "folded"))
    c = coefficients(fold(plan), LanguageModel(plan.target, fold(plan).multipliers))
    assert isinstance(report, ConversionReport)
    assert report.changed == sum(not math.isclose(v, 1) for v in c.values()) > 2
    assert report.met == {n for n, _ in LanguageModel(plan.target, plan.multipliers).named_parameters()}
