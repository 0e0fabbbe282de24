"""``mue inspect``: totals, gates with their advice, factors a model already has, shapes in mue's numbers, the walk."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch

import mue
from mue.layouts import inspect as inspection
from mue.layouts.inspect import inspect, lines, walk
from mue.layouts.transformers.configs import build, default_config, read_config
from mue.layouts.transformers.tiny import shrink
from support.own_models.case import SHAPES, TUNED
from support.own_models.chains import Chains

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


def test_a_config_that_does_not_count_active_experts_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.layout_models import UP, Config, Strange

    class Silent(Strange):
        config_class = Config

    monkeypatch.setitem(sys.modules, "silent", type(sys)("silent"))
    monkeypatch.setattr(sys.modules["silent"], "Silent", Silent, raising=False)
    assert "does not say how many experts a token uses" in inspect("silent:Silent", [UP]).no_shape


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


def test_scores_over_the_picked_experts_alone_are_seen() -> None:
    routing = inspect(shrink(default_config("kolibri1"), 2)).routing
    assert routing is not None and routing.score == "sigmoid"


def test_factors_that_a_model_has_already_come_with_what_switches_them_off() -> None:
    config = default_config("granitemoe")
    assert not any(s.active for s in inspect(config).scalings)  # all its multipliers are 1
    config.residual_multiplier, config.logits_scaling = 0.22, 6.0
    found = inspect(config)
    assert {s.attribute for s in found.scalings if s.active} == {"residual_multiplier", "logits_scaling"}
    assert any("residual_multiplier = 0.22" in line and "set residual_multiplier = 1 " in line for line in lines(found))


def test_an_undecided_parameter_comes_with_its_line() -> None:
    found = inspect("axk2")
    assert found.shape is None and len(found.undecided) == 4
    assert all("add Layout('model.layers.*." in line for line in found.undecided)


def test_a_folder_a_file_and_a_family_are_one_thing(tmp_path: Path) -> None:
    default_config("olmoe").save_pretrained(tmp_path)
    assert read_config(tmp_path).to_dict() == read_config(tmp_path / "config.json").to_dict()
    assert inspect(tmp_path).parameters == inspect("olmoe").parameters
    plain = read_config(tmp_path).to_dict()
    (tmp_path / "config.json").write_bytes(codecs.BOM_UTF8 + (tmp_path / "config.json").read_bytes())
    assert read_config(tmp_path).to_dict() == plain
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="needs JSON with a model_type"):
        read_config(tmp_path)
    (weights := tmp_path / "model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"model\.pt is not.*weights do not say which model.*give its folder"):
        read_config(weights)
    (code := tmp_path / "build.py").write_text("import torch\n")
    with pytest.raises(ValueError, match=r"build\.py is not.*FILE\.py:FUNCTION"):
        read_config(code)
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


def test_the_walk_goes_on_to_the_models_that_draw_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    every = inspection.image_classes()
    asked = [
        "diffusers.SD3Transformer2DModel",
        "diffusers.FluxTransformer2DModel",
        "diffusers.ErnieImageTransformer2DModel",
    ]
    assert set(every) >= {*asked, "diffusers.PixArtTransformer2DModel", "diffusers.HiDreamImageTransformer2DModel"}
    monkeypatch.setattr(inspection, "families_with_experts", lambda: ["mixtral"])
    monkeypatch.setattr(inspection, "image_classes", lambda: asked)
    mixtral, sd3, flux, ernie = walk()
    assert mixtral["family"] == "mixtral" and mixtral["passed"] and sd3["passed"]
    assert flux["undecided"] == ["single_transformer_blocks.*.proj_out.weight"] and "down projection" in flux["reason"]
    assert not ernie["passed"] and "needs text_bth, text_lens" in ernie["reason"]


MODEL = '''
"""A MoE of the user's own, in a file of its own."""
from dataclasses import dataclass

from support.layout_models import UP, Config, Strange

import mue
from mue.lab.models.language import LanguageModel


@dataclass
class Routed(Config):
    top_k: int = 2


class Mine(Strange):
    def __init__(self, config):
        super().__init__(config)
        self.config = config


ROWS = [UP]


def build():
    model = Mine(Routed())
    model.layout_rows = ROWS
    return model


def declared():
    return LanguageModel(mue.MoE.parse("4e2a", width=32, expert=16, layers=2, head_dim=16))


def nothing():
    return mue.lab.models.layers.RMSNorm(8)


def asks(width):
    pass


def both():
    return build(), "optimizer"
'''


def test_a_class_or_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    numbers = {"hidden_size": 32, "vocab_size": 48, "intermediate_size": 40, "num_experts": 6, "top_k": 2}
    numbers |= {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    from mue.util.importing import imported

    by_class = inspect("mine.py:Mine", imported("mine.py:ROWS"), config="config.json")
    by_function = inspect("mine.py:build")  # its rows are the model's own layout_rows
    assert by_class.rows == by_function.rows and not by_class.undecided
    assert {r.pattern: r.fan_in for r in by_class.rows}["layers.*.moe.back"] == 40
    assert len(inspect("mine.py:Mine", config="config.json").undecided) == 1
    declared = inspect("mine.py:declared")
    assert {r.how for r in declared.rows} == {"declared by the model"} and declared.shape is not None
    assert declared.shape.name == "4e2a d32 L2"
    assert inspect("transformers.Qwen3ForCausalLM").rows == inspect("qwen3").rows
    for name, message in {
        "mine.py:Mine": "Mine is a class: give --config",
        "mine.py:nothing": r"RMSNorm has neither a layout.* \(mue inspect mine\.py:nothing --propose prints",
        "mine.py:asks": "called without arguments, which it does not take",
        "mine.py:both": "a tuple is neither a model nor a config: give, or return, the model alone",
        "mine.py:biuld": "has no 'biuld'; did you mean 'build'",
        "mine.py:ROWS": "ROWS is a list",
        "other.py:build": r"other\.py does not exist",
        "no_such_package.Model": "no_such_package cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=message):
            inspect(name)


def test_a_checkpoint_is_compared_with_its_own_config(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mue.layouts.transformers.tiny import shrink

    config = shrink(default_config("mixtral"), 2)
    config.tie_word_embeddings = True
    build(config).save_pretrained(tmp_path, max_shard_size="40KB")  # type: ignore[operator]  # experts one by one
    found = inspect(tmp_path)
    assert found.stored is not None and found.stored.fits and found.stored.tensors > len(found.rows)
    shard = max(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    tensors = load_file(shard)
    (gone, *_) = (n for n in tensors if "experts" in n)
    cut = next(n for n in tensors if "experts" in n and n != gone)
    tensors = {("what." if n == gone else "") + n: t[:-1].clone() if n == cut else t for n, t in tensors.items()}
    save_file(tensors, shard)
    wrong = inspect(tmp_path).stored
    assert wrong is not None and wrong.unexpected == (f"what.{gone}",)
    assert len(wrong.other_shapes) in (1, 2) and "numbers, not" in wrong.other_shapes[0]
    save_file({n: t for n, t in tensors.items() if "embed" not in n}, shard)
    small = load_file(shard)
    save_file({n: t for n, t in small.items() if "norm" not in n}, shard)
    for path in tmp_path.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if "model.norm" not in n}, path)
    assert "model.norm.weight" in inspect(tmp_path).stored.missing  # type: ignore[union-attr]


BIG = """
import json, resource, sys, torch
torch.set_num_threads(1)
import mue
from mue.layouts.inspect import inspect
from mue.layouts.transformers.configs import default_config
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


def test_heads_said_layer_by_layer_have_to_agree() -> None:
    """A head size from another number of heads would be wrong without a word (Laguna says both)."""
    pytest.importorskip("transformers")
    from mue.layouts.transformers.configs import default_config
    from mue.layouts.transformers.tiny import shrink

    small = shrink(default_config("laguna"), 2)
    assert set(small.num_attention_heads_per_layer) == {small.num_attention_heads}
    assert inspect(small).shape.num_heads == small.num_attention_heads
    small.num_attention_heads_per_layer = [2 * small.num_attention_heads] * len(small.num_attention_heads_per_layer)
    known = inspect(small)
    assert known.shape is None and "num_attention_heads_per_layer has 8 heads" in known.no_shape


def test_numbers_within_an_expert_are_kinds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    base, target = SHAPES["lists"]
    model = Chains(target, mue.transfer(base, target, TUNED).multipliers)
    roles = {row.pattern: (row.role, row.tensors) for row in inspect(model).rows}
    assert roles["h.*.experts.*.0.weight"] == ("expert_up", 8)
    assert roles["h.*.experts.*.2.weight"] == ("expert_down", 8)
    own = model.layout()
    monkeypatch.setattr(model, "layout", lambda: [row for row in own if row.role != "expert_up"])
    [missing] = inspect(model).undecided  # not the pattern of both, which would have one role
    assert "Layout('h.*.experts.*.0.weight', ROLE, ('out', 'in'))" in missing


def test_numbers_that_only_the_rows_tell_apart() -> None:
    found = inspect(Pairs())
    assert [(row.pattern, row.role) for row in found.rows] == [
        ("h.{layer}.0.weight", "ffn_up"),
        ("h.{layer}.1.weight", "ffn_down"),
    ]


class Pairs(torch.nn.Module):
    """Two square matrices of a layer in a list, as layers or experts are."""

    def __init__(self) -> None:
        super().__init__()
        pairs = (torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2)) for _ in range(3))
        self.h = torch.nn.ModuleList(pairs)

    def layout(self) -> list[mue.Layout]:
        w = ("out", "in")
        return [mue.Layout("h.{layer}.0.weight", "ffn_up", w), mue.Layout("h.{layer}.1.weight", "ffn_down", w)]
