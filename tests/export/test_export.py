"""Exports: golden files, and the written code giving exactly our groups and starts. (Real packages: test_export_torchtitan, _megatron, _olmo.)"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mue
from mue.export import STACKS, export, rows
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.of_model import placed
from mue.model.apply import param_groups
from mue.shapes import Transformer
from support.command_line import in_process, refused
from support.paths import GOLDEN

BASE = mue.Dense(width=32, ffn=32, layers=1, head_dim=16, vocab=64)
TARGET = mue.Mixed(
    64, (mue.Block(layers=1, ffn=128), mue.Block(layers=2, experts=8, active=2, expert=32)), head_dim=16, vocab=64
)
PLAN = mue.transfer(BASE, TARGET, mue.HParams(lr=2**-9, weight_decay=0.125, init_std=2**-6, eps=2**-40))
OF_TORCH = ("torchtitan", "megatron", "olmo-core")  # stacks that bring their own models
HAVE_MODELS = (*OF_TORCH, "optax")  # a file that needs none; the others are handed one here


def model() -> LanguageModel:
    """With no multipliers, as any stack's own model."""
    return LanguageModel(TARGET, fold(PLAN).multipliers)


def written(to: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(export(PLAN, to, model()), namespace)
    return namespace


@pytest.mark.parametrize("to", STACKS)
def test_the_files_are_the_golden_ones(to: str) -> None:
    text = PLAN.export(to, model() if to not in HAVE_MODELS else None)
    assert text.count(f"hyperparameters of plan {PLAN.hash} (") == 1  # the one that the terminal says
    text = re.sub(r"plan [0-9a-f]{16}", "plan HASH", text)
    path = next(GOLDEN.glob(f"{to}.*"), GOLDEN / f"{to}.txt")
    if os.environ.get("MUE_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.exists(), f"a new stack: MUE_WRITE_GOLDEN=1 writes {path.name}; read it before it is committed"
    assert text == path.read_text()
    if ".py" in path.suffixes:
        compile(text, to, "exec")


def test_every_number_of_a_yaml_file_is_one_to_its_reader() -> None:
    yaml = pytest.importorskip("yaml")
    plan = mue.transfer(
        BASE, TARGET, PLAN.tuned.replace(lr=2e-5, weight_decay=1e-6, eps=1e-12, roles={"head": {"lr": 4e-10}})
    )
    read = yaml.safe_load(plan.export("automodel", model()))["optimizer"]
    overrides = read.pop("param_group_overrides")
    found = {**read, **{f"{o['pattern']} {k}": v for o in overrides for k, v in o.items() if k != "pattern"}}
    assert {k for k, v in found.items() if not isinstance(v, float)} == {"_target_", "betas"}
    rates = [read["lr"], *(read["lr"] * o["lr_mult"] for o in overrides)]
    wanted = {group["lr"] for group in param_groups(fold(plan), model())}
    assert {f"{rate:.10g}" for rate in rates} == {f"{lr:.10g}" for lr in wanted} and min(wanted) < 1e-9


def test_the_written_groups_are_ours() -> None:
    net = model()
    ours, theirs = param_groups(fold(PLAN), net), written("torch")["param_groups"](net)

    def keyed(groups: list[dict[str, Any]]) -> dict[tuple[float, ...], set[int]]:
        return {(g["lr"], g["weight_decay"], g["eps"], *g["betas"]): {id(p) for p in g["params"]} for g in groups}

    assert keyed(ours) == keyed(theirs)
    torch.optim.AdamW(theirs)


def test_the_written_init_has_our_standard_deviations() -> None:
    net = model()
    written("torch")["init_"](net, seed=3)
    assert len(placed(net)) == len(list(net.parameters()))
    for p in placed(net):
        std = fold(PLAN).role(p.role, p.layer).values.init_std
        if std is None:
            assert torch.equal(p.parameter, torch.ones_like(p.parameter))
        else:
            assert float(p.parameter.detach().std()) == pytest.approx(std, rel=0.1)


def test_the_written_code_refuses_another_model() -> None:
    code = written("torch")
    with pytest.raises(ValueError, match="rows match nothing"):
        code["param_groups"](LanguageModel(mue.Dense(width=64, ffn=128, layers=3, head_dim=16, vocab=64)))
    net = model()
    net.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight matches 0 rows"):
        code["param_groups"](net)


def test_the_written_code_sees_through_wrappers() -> None:
    wrapped = torch.compile(model())
    assert len(written("torch")["param_groups"](wrapped)) == len(param_groups(fold(PLAN), model()))


def test_a_trainer_gets_an_optimizer_and_a_relative_schedule() -> None:
    net = model()
    optimizer, schedule = written("transformers")["trainer_arguments"](net, lambda step: 0.5)["optimizers"]
    assert len(optimizer.param_groups) > 3
    assert all(g["lr"] == pytest.approx(0.5 * g["initial_lr"]) for g in optimizer.param_groups)
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)


def test_layers_that_differ_are_listed() -> None:
    roles = {"last_third": {"ffn_down": {"lr_times": 2.0}}}
    base = mue.Dense(width=32, ffn=32, layers=3, head_dim=16, vocab=64)
    target = mue.Dense(width=64, ffn=64, layers=6, head_dim=16, vocab=64)
    plan = fold(mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02, roles=roles)))
    downs = [r for r in rows(plan, LanguageModel(target, plan.multipliers)) if r.roles == "ffn_down"]
    assert [r.layers for r in downs] == [(0, 1, 2, 3), (4, 5)]
    assert downs[1].lr == 2 * downs[0].lr
    assert [bool(re.fullmatch(r.regex, "blocks.4.ffn.down.weight")) for r in downs] == [False, True]
    assert downs[1].globs == ["blocks.4.ffn.down.weight", "blocks.5.ffn.down.weight"]


def test_unknown_stacks_and_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown stack 'torhc'; did you mean 'torch'"):
        export(PLAN, "torhc", model())
    with pytest.raises(ValueError, match="unknown stack 'torchtitans'; did you mean 'torchtitan'"):
        export(PLAN, "torchtitans")
    lion = mue.transfer(BASE, TARGET, mue.HParams(lr=1e-4, weight_decay=0.1, init_std=0.02, optimizer="lion"))
    with pytest.raises(ValueError, match="exports speak AdamW"):
        export(lion, "torch", LanguageModel(TARGET, fold(lion).multipliers))


@pytest.mark.parametrize(
    ("target", "family"),
    [
        (mue.Dense(64, 128, 2, head_dim=16, vocab=64, tied=True), "Qwen3ForCausalLM"),
        (mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=16, vocab=64, router="softmax"), "Qwen3MoeForCausalLM"),
        (mue.Mixed(64, (mue.Block(layers=1, ffn=128), mue.Block(layers=2, experts=8, active=2, expert=32, shared_experts=1)), head_dim=16, vocab=64), "Glm4MoeForCausalLM"),
    ],
)  # fmt: skip
def test_without_a_model_a_transformers_family_of_the_planned_shape(target: Transformer, family: str) -> None:
    pytest.importorskip("transformers", reason="needs the hf extra")
    base = mue.Dense(32, 32, 2, head_dim=16, vocab=64, tied=target.tied)
    plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    text = export(plan, "transformers")
    assert f"For {family}, model_type" in text
    assert "hidden_size=64" in text


LAB = {
    "dense": mue.Dense(64, 128, 2, head_dim=16, vocab=64),
    "tied, ungated": mue.Dense(64, 128, 2, head_dim=16, vocab=64, tied=True, gated=False),
    "few kv heads": mue.Dense(64, 128, 2, head_dim=16, kv_heads=2, vocab=64),
    "mixed": TARGET,
    "softmax, shared": mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, vocab=64, router="softmax"),
    "hash": mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, vocab=64, router="hash"),
    "shared alone": mue.MoE.parse("2s", width=64, expert=32, layers=2, head_dim=16, vocab=64),
}


@pytest.mark.parametrize("shape", LAB)
def test_without_a_model_torch_is_written_for_the_labs(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape has one in the lab, with nothing more installed: the command and ``plan.export`` say the same."""
    target = LAB[shape]
    monkeypatch.setitem(sys.modules, "transformers", None)
    base = mue.Dense(32, 32, 2, head_dim=16, vocab=64, tied=target.tied, gated=target.gated)
    plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    text = plan.export("torch")
    made = LanguageModel(target, fold(plan).multipliers)
    assert sorted(text.splitlines()) == sorted(export(plan, "torch", made).splitlines())  # ROWS in another order
    code: dict[str, Any] = {}
    exec(text, code)
    assert sum(len(group["params"]) for group in code["param_groups"](made)) == len(list(made.parameters()))
    other = mue.Dense(64, 128, 3, head_dim=16, vocab=64, gated=not target.gated)
    with pytest.raises(ValueError, match=r"this plan|rows match nothing"):
        code["param_groups"](LanguageModel(other))


def test_a_stack_from_outside_is_one_function() -> None:
    @STACKS.register("one-line")
    def one_line(plan: Any, given: Any) -> str:
        """lr of every kind of parameter."""
        return " ".join(f"{row.roles}={row.lr:g}" for row in rows(fold(plan), given))

    try:
        assert "one-line" in STACKS
        text = PLAN.export("one-line", model())
        assert f"embedding={PLAN.role('embedding').values.lr:g}" in text.split()
    finally:
        STACKS._entries.pop("one-line")
    with pytest.raises(ValueError, match="unknown stack 'one-line'"):
        PLAN.export("one-line", model())


def test_a_shape_that_no_default_family_has_is_refused() -> None:
    pytest.importorskip("transformers", reason="needs the hf extra")
    target = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, vocab=64, router="softmax")
    plan = mue.transfer(BASE, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    with pytest.raises(ValueError, match=r"softmax gates, 1 shared experts\): give a config with --model"):
        export(plan, "transformers")
    grouped = mue.MoE.parse("8e2a2g", width=64, expert=32, layers=2, head_dim=16, vocab=64, router="softmax")
    plan = mue.transfer(BASE, grouped, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    with pytest.raises(ValueError, match=r"chosen a/g from each of 2 groups\): give a config with --model"):
        export(plan, "transformers")


# ---- the command -------------------------------------------------------------------------------------------------

BUILD = """
import torch
from mue.fold import fold
from mue.lab.models.language import LanguageModel

def build(plan):
    with torch.device("meta"):
        return LanguageModel(plan.target, fold(plan).multipliers)
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    return path


def test_the_command_prints_or_writes(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for to in STACKS:
        given = ["--model", f"{tmp_path / 'train.py'}:build"] if to not in HAVE_MODELS else []
        (tmp_path / "train.py").write_text(BUILD)
        code, out, _ = in_process(capsys, monkeypatch, "export", plan_file, "--to", to, *given)
        assert code == 0
        assert out == export(PLAN, to, model() if given else None)
    out_file = tmp_path / "made" / "recipe.py"
    code, out, _ = in_process(capsys, monkeypatch, "export", plan_file, "--to", "torchtitan", "--out", out_file)
    assert code == 0 and out.startswith(str(out_file))
    assert out_file.read_text() == export(PLAN, "torchtitan")
    code, out, _ = in_process(capsys, monkeypatch, "export", plan_file, "--to", "torch")
    assert code == 0 and out == export(PLAN, "torch") == PLAN.export("torch")


def test_the_command_explains_mistakes(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(*arguments: object) -> tuple[int, str, str]:
        return in_process(capsys, monkeypatch, "export", plan_file, *arguments)

    out = tmp_path / "file.py"
    refused(said("--to", "megatorn", "--out", out), "did you mean 'megatron'")
    refused(said("--to", "megatron", "--model", "locale"), "did you mean 'local'", "file.py:function")
    refused(said("--to", "olmo-core", "--model", "nowhere.py:build"), "nowhere.py does not exist")
    assert not out.exists()
    code, _, err = said()
    assert code == 2 and "--to" in err


@pytest.mark.parametrize("to", OF_TORCH)
def test_multipliers_in_the_forward_pass_are_not_exported_a_second_time(to: str) -> None:
    """Those stacks read names and shapes of a model, and did not see that it multiplies by what the file folds into its values."""
    route = "weights" if to == "olmo-core" else "model"  # who carries R there
    with pytest.raises(ValueError, match=rf"output multiplier is .*build it with mue\.fold\.fold\(plan, '{route}'\)"):
        export(PLAN, to, LanguageModel(TARGET, PLAN.multipliers))
    if to != "megatron":  # which refuses the names of this model
        assert "ROWS" in export(PLAN, to, LanguageModel(TARGET, fold(PLAN, route).multipliers))


def test_losses_of_routers_are_said() -> None:
    """A plan carries their coefficients, and no stack's file turns them on by itself."""
    losses = {"losses": {"entropy": 1e-3}}
    said = replace(TARGET, blocks=(TARGET.blocks[0], replace(TARGET.blocks[1], router_settings=losses)))
    plan = fold(mue.transfer(BASE, said, PLAN.tuned))
    text = " ".join(export(plan, "torch", LanguageModel(said, plan.multipliers)).split())
    line = "auxiliary losses of the routers, with their coefficients (sigmoid: entropy 0.001)"
    assert line in text and "auxiliary losses" not in export(PLAN, "torch", model())
