"""Plans of Muon in each stack's words: golden files, rates in the stack's convention, and what is refused by the tensor's name."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

import mue
from mue.export import STACKS, export, rows
from mue.export.muon import one_rate, restated
from mue.export.skeleton import shaped
from mue.export.stack_model import QKV, StackModel, param
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.rules.optimizers import BOTH
from mue.shapes import Transformer
from mue.shapes.update_scales import converted
from support.paths import GOLDEN
from support.stack_values import run

SIZES: dict[str, Any] = {"head_dim": 16, "vocab": 64}
TUNED = mue.HParams(
    lr=2**-6, adamw_lr=2**-9, weight_decay=0.125, init_std=2**-6, eps=2**-40, optimizer="muon", momentum=0.875
)
DENSE = mue.Dense(64, 128, 2, **SIZES)
MOE = mue.Mixed(64, (mue.Block(layers=1, ffn=128), mue.Block(layers=2, experts=8, active=2, expert=64)), **SIZES)


def plan_of(target: Transformer, layers: int | None = None, **tuned: Any) -> mue.Plan:
    base = mue.Dense(32, 64, layers or target.layers, gated=target.gated, **SIZES)
    return mue.transfer(base, target, TUNED.replace(**tuned))


def own(plan: mue.Plan) -> LanguageModel:
    return LanguageModel(plan.target, fold(plan).multipliers)


UNGATED = mue.Mixed(
    64,
    (mue.Block(layers=1, ffn=128), mue.Block(layers=1, experts=4, active=2, expert=64, shared_experts=1)),
    gated=False,
    **SIZES,
)
# a plan that each stack can say, and the model that it is written for
SAID: dict[str, tuple[mue.Plan, Any]] = {
    "torch": (plan_of(MOE, 1), own),
    "transformers": (plan_of(MOE, 1), own),
    "automodel": (
        plan_of(mue.Dense(32, 64, 2, **SIZES), adamw_lr=None, weight_decay=0.0, update_scale="match-rms"),
        own,
    ),
    "torchtitan": (plan_of(MOE), "qwen3_unfused"),
    "megatron": (plan_of(UNGATED, 1), "local"),
    "olmo-core": (plan_of(DENSE, 1, update_scale="keller"), None),
    "optax": (plan_of(MOE, 1), None),
}


@pytest.mark.parametrize("to", SAID)
def test_the_files_are_the_golden_ones(to: str) -> None:
    plan, given = SAID[to]
    text = export(plan, to, given(plan) if callable(given) else given)
    assert text.count(f"hyperparameters of plan {plan.hash} (") == 1
    text = re.sub(r"plan [0-9a-f]{16}", "plan HASH", text)
    path = GOLDEN / f"muon-{to}.{'yaml' if to == 'automodel' else 'py.txt'}"
    if os.environ.get("MUE_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.exists(), f"MUE_WRITE_GOLDEN=1 writes {path.name}; read it before it is committed"
    assert text == path.read_text()
    if ".py" in path.suffixes:
        compile(text, to, "exec")


def test_every_stack_is_asked() -> None:
    """One that says nothing of Muon must refuse it, as rows() does by itself."""
    plan = SAID["torch"][0]
    assert set(STACKS) == set(SAID)  # with none that refuses
    with pytest.raises(ValueError, match="exports speak AdamW, and this plan is for 'muon'"):
        rows(fold(plan), own(plan))


@pytest.mark.parametrize("scale", ["spectral", "keller", "match-rms"])
def test_rates_are_stated_in_torchs_convention(scale: str) -> None:
    """Of each matrix by its own shape, exactly: √(out/in) becomes √max(1, out/in), which torch has."""
    plan = plan_of(MOE, 1, update_scale=scale)
    code = run(export(plan, "torch"))
    stated = {"spectral": "keller"}.get(scale, scale)
    assert code["ADJUST_LR_FN"] == {"keller": "original", "match-rms": "match_rms_adamw"}[stated]
    for i, (_, _, _, parts) in code["MATRICES"].items():
        row, ((out, lr, wd),) = code["ROWS"][i], parts
        fan_in = 128 if r"\.ffn\.down" in row[0] else 64
        assert (lr, wd) == (row[1:3] if stated == scale else converted(*row[1:3], scale, stated, out, fan_in))
    assert len(code["MATRICES"]) == 4 + 3 + 3


REFUSED: dict[str, tuple[str, mue.Plan, Any, str]] = {
    "gate and up": (
        "megatron", plan_of(MOE), "local",
        r"mlp\.linear_fc1\.weight holds ffn_gate \+ ffn_up in one tensor, and Megatron-Core 0\.16 would orthogonalise them as one .*gated = false",
    ),
    "fused q, k and v": (
        "torchtitan", plan_of(MOE), None,
        r"attention\.qkv_linear\.wqkv\.weight holds attention_q \+ .*torchtitan's DistMuon would .*--model qwen3_unfused",
    ),
    "several rates": (
        "torchtitan", plan_of(MOE, 1), "qwen3_unfused",
        r"takes one group for all that Muon moves, and the plan has lr 0\.0\d+, weight decay .* for layers\.\*\.attention\.qkv_linear\.wq\.weight and .* for layers",
    ),
    "experts in one tensor": (
        "olmo-core", plan_of(MOE), "moe_dropless",
        r"experts\.mlp\.w1 holds all experts in one tensor of axes \(expert\*out, in\), and OLMo-core's Muon would",
    ),
    "experts of three axes": (
        "automodel", plan_of(MOE), own,
        r"moe\.experts_gate holds all experts in one tensor of axes \(expert, out, in\), and Automodel gives tensors of three axes to AdamW",
    ),
    "two rates": (
        "automodel", plan_of(DENSE), own,
        r"Automodel's Muon has one lr and one weight decay for all .*for embedding\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stack_cannot_say_is_refused(case: str) -> None:
    to, plan, given, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        export(plan, to, given(plan) if callable(given) else given)


def test_a_router_that_automodel_would_give_to_muon_is_named() -> None:
    """It is a matrix of two axes; the experts beside it are left out here, for they are refused before."""
    from mue.export.automodel import _muon

    plan = fold(plan_of(MOE))
    found = [row for row in rows(plan, own(plan), optimizers=BOTH) if "expert" not in row.roles]
    with pytest.raises(
        ValueError, match=r"router\.weight is a matrix, and Automodel gives every matrix .* router in muon_moves"
    ):
        _muon(plan, found, 1e-12)


def test_parts_that_would_part_are_refused() -> None:
    """Queries and keys of other sizes have one rate in one convention alone."""
    few = mue.Dense(64, 128, 2, kv_heads=1, **SIZES)
    plan = fold(plan_of(few))
    table = shaped(StackModel("", (*FUSED,)), few, "a model with a fused projection")
    found = rows(plan, table, optimizers=BOTH)
    assert restated(found, plan, "spectral") == found
    with pytest.raises(
        ValueError, match=r"h\.\*\.qkv holds .* one rate in the plan's convention 'spectral' and several in 'match-rms'"
    ):
        restated(found, plan, "match-rms")


FUSED = (
    param("wte", "embedding", ("in", "out")),
    param("h.*.qkv", QKV),
    *(param(f"h.*.{name}", name) for name in ("attention_o", "ffn_up", "ffn_gate", "ffn_down")),
    param("h.*.norm", "norm", ("vector",)),
    param("h.*.qk", "qk_norm", ("vector",)),
    param("final", "final_norm", ("vector",)),
    param("head", "head"),
)


def test_one_rate_is_looked_for_in_each_convention() -> None:
    """What differs in the plan's own may agree in another one of the stack's."""
    plan = fold(plan_of(MOE, update_scale="keller"))
    found = [row for row in rows(plan, own(plan), optimizers=BOTH) if row.matrices]
    assert len({row.lr for row in found}) > 1
    base = fold(plan_of(mue.Dense(32, 64, 3, **SIZES), update_scale="spectral"))
    matrices = [row for row in rows(base, own(base), optimizers=BOTH) if row.matrices]
    assert one_rate(matrices, base, ["match-rms", "spectral"], "")[0] == "spectral"
    with pytest.raises(ValueError, match="one rate only, and the plan has lr"):
        one_rate(matrices, base, ["match-rms", "keller"], "one rate only")
