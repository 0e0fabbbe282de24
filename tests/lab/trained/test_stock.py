"""mue.lab.trained.stock: checkpoints of transformers at other numbers of experts, against the library's own models."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mue.lab.trained.active import ask
from mue.lab.trained.held_out import WHOLE
from mue.lab.trained.ranges import active_of
from mue.lab.trained.stock import StockCheckpoint
from mue.lab.trained.subject import subject_of
from mue.lab.trained.to_transformers import byte_tokenizer
from mue.layouts.inspect import inspect

transformers = pytest.importorskip("transformers", reason="stock checkpoints are the hf extra's")

from support.stock_models import tiny  # noqa: E402 - it needs transformers

FAMILIES = {
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
}
CPU = torch.device("cpu")


def saved(family: str, folder: Path, tokenizer: bool = True) -> Path:
    """A tiny random model of a family whose tokens are bytes."""
    config = tiny(
        family,
        vocab_size=256,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
        **FAMILIES.get(family, {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.json").write_text(byte_tokenizer())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_is_another_config_over_the_same_weights(family: str, tmp_path: Path) -> None:
    model = StockCheckpoint(saved(family, tmp_path / family), CPU)
    assert (model.trained, model.experts, model.sequence) == (2, 8, 128)
    normalised = family in ("mixtral", "qwen3_moe", "deepseek_v3")
    assert model.scales == (("mean", "root") if normalised else ("mean", "root", "sum"))
    tokens_BT = torch.randint(1, 256, (2, 12))
    with torch.no_grad():
        trained = model.logits(tokens_BT)
        for k in (1, 4, 8):
            config = copy.deepcopy(model.config)
            config.num_experts_per_tok = k
            other = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / family, config=config, attn_implementation="eager", dtype=torch.float32
            ).eval()
            # the sum of the experts is linear in their down projections
            for scale, factor in (("mean", 1.0), ("root", (k / 2) ** 0.5), ("sum", k / 2)):
                factor = factor if normalised else factor / (k / 2)
                scaled = copy.deepcopy(other)
                for name, p in scaled.named_parameters():
                    if name.endswith("experts.down_proj"):
                        p.mul_(factor)
                expected = scaled(input_ids=tokens_BT).logits
                with model.at(k, scale) as logits:
                    torch.testing.assert_close(logits(tokens_BT), expected, rtol=1e-4, atol=1e-5)
            assert (expected - trained).abs().max() > 1e-2  # the control: another number is seen
        torch.testing.assert_close(model.logits(tokens_BT), trained, rtol=0, atol=0)


def test_weights_that_do_not_arrive_are_seen_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StockCheckpoint(saved("mixtral", tmp_path), CPU)
    assert model.refusal(4, "root") is None
    model = StockCheckpoint(tmp_path, CPU)
    monkeypatch.setattr("mue.lab.trained.stock.scaled_gates", lambda model, factor: nullcontext(set()))
    assert model.refusal(4, "mean") is None and model.refusal(2, "root") is None
    with pytest.raises(ValueError, match=r"not handed their weights.*use --scale mean"):
        next(ask(model, [1, 4], ["mean", "root"], [], None))


def test_flops_are_those_of_the_shape(tmp_path: Path) -> None:
    model = StockCheckpoint(saved("qwen3_moe", tmp_path), CPU)
    for k in (1, 2, 8):
        config = copy.deepcopy(model.config)
        config.num_experts_per_tok = k
        shape = inspect(config).shape
        assert shape is not None
        assert model.flops(k) == pytest.approx(replace(shape, sequence=model.sequence).flops_per_token / 3)
    assert model.flops(None) == model.flops(2)


def test_it_is_asked_about_text(domains: Path, tmp_path: Path) -> None:
    subject = subject_of(saved("olmoe", tmp_path / "olmoe"), domains, 8, None, CPU)
    assert list(subject.text.windows) == [WHOLE, ".", "one", "two"]
    model = subject.any_active()
    points = list(ask(model, active_of("1..3k", model)[0], ["sum"], subject.text.windows[WHOLE], subject.bytes_of))
    assert [p.active for p in points] == [2, 1, 2, 3, 4, 5, 6]
    assert points[2].scores == points[0].scores and points[0].scores.per_byte == points[0].scores.per_token


def test_what_is_missing_is_said(domains: Path, tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "a", tokenizer=False)
    with pytest.raises(ValueError, match="holds no text: give --data"):
        subject_of(folder, None, 8, None, CPU)
    with pytest.raises(ValueError, match=r"no tokenizer\.json: say where its tokenizer is with --tokenizer"):
        subject_of(folder, domains, 8, None, CPU)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors"):
        subject_of(folder, domains, 8, None, CPU)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        subject_of(folder, domains, 8, None, CPU)
    shutil.copy(saved("qwen3_moe", tmp_path / "b") / "model.safetensors", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"do not fit its config\.json \(missing: model\.layers\.2"):
        subject_of(folder, domains, 8, None, CPU)
    (folder / "config.json").write_text('{"model_type": "qwen3_mow"}')
    with pytest.raises(ValueError, match="did you mean 'qwen3_moe'"):
        subject_of(folder, domains, 8, None, CPU)
    dense = saved("qwen3", tmp_path / "dense")
    with pytest.raises(ValueError, match="no routed experts"):
        active_of("1..2", subject_of(dense, domains, 8, None, CPU).any_active())
