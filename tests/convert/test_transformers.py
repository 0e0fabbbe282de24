"""``mue convert`` on folders as transformers and its Trainer leave them: shards, experts one by one, configs, optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

import mue
from mue.cli import app
from mue.convert.transformers import changed_config
from mue.fold import coefficients, fold
from mue.layouts.of_model import placed
from mue.layouts.transformers.disk import StoredNames, stored_shapes
from mue.model.apply import init_, param_groups
from mue.model.tensor_plan import tensor_plans
from support.precision import close
from support.stock_models import planned, stock, tiny

torch.set_num_threads(1)
K = 5


def convert(source: Path, plan: mue.Plan, to: str, out: Path, *more: str) -> str:
    plan.save(out.parent / "plan.json")
    command = ["convert", source, "--plan", out.parent / "plan.json", "--to", to, "--out", out, *more]
    done = CliRunner().invoke(app, list(map(str, command)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def saved(model: nn.Module, folder: Path, shard: str = "30KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    return folder


def loaded(like: nn.Module, folder: Path) -> Any:
    kind: Any = type(like)
    return kind.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({}, "weights"),  # experts one by one on disk, fused in memory
    "deepseek_v3": ({"routed_scaling_factor": 2.0}, "model"),  # R stays in the config
    "gpt_oss": ({}, "weights"),  # biases in what is folded
    "olmo2": ({}, "weights"),  # the residual multiplier in the gains of norms
}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("gpt_oss", "deepseek_v3") else f for f in CASES]
)
def test_a_trainers_folder_goes_there_and_back_and_trains_on(family: str, tmp_path: Path) -> None:
    own, route = CASES[family]
    config = tiny(family, **own)
    plan = planned(config)
    folded = fold(plan, route)
    straight, model = stock(config), stock(config)
    init_(folded, straight)
    model.load_state_dict(straight.state_dict())

    def trained(model: nn.Module, state: Path | None, start: int, steps: int) -> Any:
        optimizer = torch.optim.AdamW(param_groups(folded, model))
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / 40)
        if state is not None:
            optimizer.load_state_dict(torch.load(state / "optimizer.pt", weights_only=True))
            scheduler.load_state_dict(torch.load(state / "scheduler.pt", weights_only=True))
        for step in range(start, start + steps):
            tokens = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
        return optimizer, scheduler

    trained(straight, None, 0, 2 * K)
    optimizer, scheduler = trained(model, None, 0, K)
    a, b, c = (tmp_path / n for n in "abc")
    saved(model, a)
    torch.save(optimizer.state_dict(), a / "optimizer.pt")
    torch.save(scheduler.state_dict(), a / "scheduler.pt")
    (a / "training_args.bin").write_bytes(b"a pickle, copied and never read")
    said = convert(a, plan, "multipliers", b, "--route", route)
    assert "stored weights scaled" in said and "tokenizer.json" in said
    convert(b, plan, "folded", c, "--route", route)
    back = loaded(model, c)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
        assert close(back(input_ids=tokens).logits, logits, operations=2000)
        assert not close(
            loaded(model, b)(input_ids=tokens).logits, logits, operations=2000
        )  # the other form, as it lies
    trained(back.train(), c, K, K)
    for p, q in zip(placed(straight), placed(back), strict=True):
        assert float((p.parameter - q.parameter).detach().abs().max()) < 1e-11, p.name
    # In between lies the form with multipliers: every weight over its c, and the optimizer in the other form's groups.
    owners = coefficients(folded, model)
    inside = loaded(model, b).state_dict()
    for p in placed(model):
        expected = p.parameter.detach() / owners[p.parameter]
        assert close(inside[p.name], expected, operations=4), p.name
        assert not close(inside[p.name], 1.01 * expected, operations=4), p.name  # the control: not both zero
    groups = torch.load(b / "optimizer.pt", weights_only=True)["param_groups"]
    rates = {e.values.lr / owners[e.info.parameter] for e in tensor_plans(folded, model) if e.values.lr}
    assert len(groups) > 3 and all(min(abs(g["initial_lr"] / r - 1) for r in rates) < 1e-12 for g in groups)
    assert (c / "training_args.bin").read_bytes() == (a / "training_args.bin").read_bytes()


def test_the_form_is_marked_in_the_config_and_outlives_stock_code(tmp_path: Path) -> None:
    config = tiny("mixtral")
    plan, model = planned(config), stock(config)
    convert(saved(model, tmp_path / "a"), plan, "folded", tmp_path / "b")
    loaded(model, tmp_path / "b").save_pretrained(tmp_path / "c")  # stock code drops what safetensors say of themselves
    assert json.loads((tmp_path / "c" / "config.json").read_text())["mue"]["form"] == "folded"
    with pytest.raises(ValueError, match="is in the folded form already"):
        raise_from(tmp_path / "c", plan, "folded", tmp_path / "d")
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d*"))


def raise_from(source: Path, plan: mue.Plan, to: str, out: Path) -> None:
    from mue.convert.checkpoint import convert_checkpoint
    from mue.convert.transformers import stock_conversion

    how, names, config = stock_conversion(source, plan, to, "weights")
    convert_checkpoint(source, out, how, names, config)


def test_a_scaled_model_another_r_and_a_missing_shard_are_refused(tmp_path: Path) -> None:
    config = tiny("granitemoe", residual_multiplier=0.22)
    saved(stock(config), tmp_path / "granite")
    with pytest.raises(ValueError, match=r"residual_multiplier = 0\.22 already scales"):
        raise_from(tmp_path / "granite", planned(config), "folded", tmp_path / "o")
    config = tiny("deepseek_v3", routed_scaling_factor=2.5)
    saved(stock(config), tmp_path / "v3")
    with pytest.raises(ValueError, match=r"routed_scaling_factor = 2\.5, which is none of the plan's \(1, 2\)"):
        raise_from(tmp_path / "v3", planned(config), "folded", tmp_path / "o")
    config = tiny("mixtral")
    folder = saved(stock(config), tmp_path / "mixtral")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"lacks \d+ parameters of the planned model"):
        raise_from(folder, planned(config), "folded", tmp_path / "o")
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}, which model.safetensors.index.json names"):
        stored_shapes(folder)
    assert not (tmp_path / "o").exists()


def test_settings_of_the_config_follow_the_form() -> None:
    """R moves between the config and the weights; attention's scale is set where the config has a word for it."""
    v3 = tiny("deepseek_v3", routed_scaling_factor=2.0)
    plan = planned(v3)
    data = v3.to_dict()
    assert changed_config(data, fold(plan, "model"), "here")["routed_scaling_factor"] == 2
    assert changed_config(data, fold(plan, "weights"), "here")["routed_scaling_factor"] == 1
    assert changed_config({**data, "routed_scaling_factor": 1.0}, plan, "here")["routed_scaling_factor"] == 2
    for family, key, value in (
        ("granitemoe", "attention_multiplier", 0.25),
        ("gemma3_text", "query_pre_attn_scalar", 16),
    ):
        config = tiny(family)
        assert changed_config(config.to_dict(), fold(planned(config)), "here")[key] == value
    llama = tiny("llama")
    assert changed_config(llama.to_dict(), fold(planned(llama)), "here") == llama.to_dict()


def test_a_folded_checkpoint_whose_queries_carry_the_attention_scale(tmp_path: Path) -> None:
    """Stock attention is 1/√16 and the plan wants half the square: folded into q, and taken out again."""
    config = tiny("qwen2")
    plan = planned(config, head_dim=8)
    model = stock(config)
    init_(fold(plan), model)
    saved(model, tmp_path / "a")
    convert(tmp_path / "a", plan, "multipliers", tmp_path / "b")
    shapes = stored_shapes(tmp_path / "a")
    old, new = (
        {k: v for f in sorted((tmp_path / n).glob("*.safetensors")) for k, v in load_file(f).items()} for n in "ab"
    )
    assert set(shapes) == set(new)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert close(new[q] * 0.5**0.5, old[q], operations=4) and not close(new[q], old[q], operations=4)


def test_names_on_disk_are_those_the_library_would_load() -> None:
    config = tiny("mixtral")
    with torch.device("meta"):
        names = StoredNames(type(stock(config))(config))
    assert names("model.layers.1.block_sparse_moe.experts.3.w2.weight") == ("model.layers.1.mlp.experts.down_proj",)
    assert names("model.norm.weight") == ("model.norm.weight",)
    assert names("layers.0.self_attn.q_proj.weight") == ("model.layers.0.self_attn.q_proj.weight",)
