"""``mue inspect``: totals, gates with their advice, factors a model already has, shapes in mue's numbers, the walk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch

import mue
from mue.inspect import inspect, walk
from mue.layouts.families import build, default_config, read_config
from mue.layouts.scalings import refuse_scaled

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_totals_are_the_models(family: str) -> None:
    found = inspect(family)
    with torch.device("meta"):
        model = build(default_config(family))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert not found.undecided and found.shape is not None
    json.dumps(found.to_dict())


def test_the_shape_is_in_mues_numbers() -> None:
    mixtral = inspect("mixtral").shape
    assert isinstance(mixtral, mue.MoE)
    assert (mixtral.width, mixtral.expert, mixtral.experts, mixtral.active, mixtral.layers) == (4096, 14336, 8, 2, 32)
    assert (mixtral.num_heads, mixtral.num_kv_heads, mixtral.head_dim, mixtral.gated) == (32, 8, 128, True)
    gpt2 = inspect("gpt2").shape
    assert isinstance(gpt2, mue.Dense)
    assert (gpt2.ffn, gpt2.gated, gpt2.tied) == (3072, False, True)
    v3 = inspect("deepseek_v3").shape
    assert isinstance(v3, mue.Mixed)
    assert [(b.layers, b.ffn, b.notation) for b in v3.blocks] == [(3, 18432, "dense"), (58, None, "256e8a1s")]
    assert v3.blocks[1].router == "sigmoid" and v3.blocks[1].shared_width == 2048


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_gates_that_do_not_sum_to_one_are_told_both_ways_out(family: str) -> None:
    found = inspect(family)
    assert found.routing is not None and found.routing.normalised is False and found.shape is None
    assert "set norm_topk_prob = true" in found.no_shape and 'gates = "measured"' in found.no_shape
    config = default_config(family)
    config.norm_topk_prob = True
    renormalised = inspect(config)
    assert renormalised.routing is not None and renormalised.routing.normalised and renormalised.shape is not None
    measured = inspect(family, gate_moments=(0.3, 0.03)).shape
    assert measured is not None and measured.blocks[-1].gates == "measured"


def test_a_switch_that_does_nothing_is_not_advised() -> None:
    # DeepSeek-V2's config lists norm_topk_prob, its code in transformers does not read it: only watching tells.
    for value in (False, True):
        config = default_config("deepseek_v2")
        config.norm_topk_prob = value
        found = inspect(config)
        assert found.routing is not None and found.routing.normalised is False
        if not value:
            assert "norm_topk_prob changes nothing in this family's code" in found.no_shape
        assert 'gates = "measured"' in found.no_shape and "set norm_topk_prob" not in found.no_shape


def test_the_models_own_route_scale_is_seen() -> None:
    found = inspect("deepseek_v3")
    assert found.routing is not None and found.routing.scale == 2.5
    assert [(s.attribute, s.value) for s in found.scalings] == [("routed_scaling_factor", 2.5)]


def test_a_model_that_is_scaled_already_is_refused() -> None:
    config = default_config("granitemoe")
    refuse_scaled(config)  # all its multipliers are 1
    config.residual_multiplier, config.logits_scaling = 0.22, 6.0
    assert {s.attribute for s in inspect(config).scalings if s.active} == {"residual_multiplier", "logits_scaling"}
    with pytest.raises(ValueError, match=r"already scaled.*\n.*set \w+ = 1\n.*set \w+ = 1"):
        refuse_scaled(config)


def test_an_undecided_parameter_comes_with_its_line() -> None:
    found = inspect("axk2")
    assert found.shape is None and len(found.undecided) == 4
    assert all("add Layout('model.layers.*." in line for line in found.undecided)


def test_a_folder_a_file_and_a_family_are_one_thing(tmp_path: Path) -> None:
    default_config("olmoe").save_pretrained(tmp_path)
    assert read_config(tmp_path).to_dict() == read_config(tmp_path / "config.json").to_dict()
    assert inspect(tmp_path).parameters == inspect("olmoe").parameters
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="needs JSON with a model_type"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_mo"}')
    with pytest.raises(ValueError, match="did you mean 'qwen3_moe'"):
        read_config(tmp_path)


def test_the_walk_reports_every_family_and_survives_each() -> None:
    found = {r["family"]: r for r in walk(["mixtral", "axk2", "dots3_note_text", "not_a_family"])}
    assert found["mixtral"]["passed"] and found["mixtral"]["undecided"] == [] and found["mixtral"]["parameters"] == 12
    assert not found["axk2"]["passed"] and len(found["axk2"]["undecided"]) == 4 and "norm" in found["axk2"]["reason"]
    assert "could not be built and run" in found["dots3_note_text"]["reason"]
    assert "unknown model family" in found["not_a_family"]["reason"]
    assert all(set(r) == {"family", "passed", "parameters", "undecided", "reason"} for r in found.values())


BIG = """
import json, resource, sys, torch
torch.set_num_threads(1)
import mue
from mue.inspect import inspect
from mue.layouts.families import default_config
config = default_config(sys.argv[1])
for key, value in json.loads(sys.argv[2]).items():
    setattr(config, key, value)
found = inspect(config)
base = mue.Dense(width=256, ffn=256, layers=8)
plan = mue.transfer(base, found.shape, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
used = resource.getrusage(resource.RUSAGE_SELF)
print(found.parameters, len(plan.roles), used.ru_maxrss / 1e6, used.ru_utime + used.ru_stime)
"""
QWEN3_235B = {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 1536, "num_experts": 128, "num_local_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "numbers", "billions"), [("deepseek_v3", {}, 671.0), ("qwen3_moe", QWEN3_235B, 235.1)]
)
def test_the_largest_models_plan_from_their_config_alone(family: str, numbers: dict[str, int], billions: float) -> None:
    run = subprocess.run(
        [sys.executable, "-c", BIG, family, json.dumps(numbers)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    parameters, roles, gigabytes, seconds = run.stdout.split()
    assert int(parameters) / 1e9 == pytest.approx(billions, abs=0.1)
    assert int(roles) > 10 and float(gigabytes) < 2.0
    assert float(seconds) < 10  # of CPU, imports of torch and transformers included
