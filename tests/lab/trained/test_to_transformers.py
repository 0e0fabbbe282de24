"""mue.lab.trained.to_transformers: the stock model computes our logits, and what no stock family computes is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Settings
from mue.lab.trained.find import TrainedRun, find
from mue.lab.trained.to_transformers import difference, stock_of, to_transformers
from mue.lab.trained.tokens import tokens_of
from support.trained import SETTINGS, trained

transformers = pytest.importorskip("transformers", reason="stock families are the hf extra's")


def exported(folder: Path, out: Path) -> tuple[TrainedRun, Any, str, float]:
    found = find(folder)
    family, apart = to_transformers(found, tokens_of(found.run.data), out)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return found, stock.eval(), family, apart


@pytest.mark.parametrize(("which", "family"), [("moe_run", "glm4_moe"), ("dense_run", "qwen3")])
def test_a_trained_run_has_the_same_logits(
    which: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In float32, on real text, with its own tokenizer. The MoE's balance biases have moved, so that they are needed (the control)."""
    found, stock, said, apart = exported(request.getfixturevalue(which), tmp_path / "out")
    assert said == family == stock.config.model_type and apart < 1e-4
    tokens = tokens_of(found.run.data)
    assert tokens is not None
    text = "def fib(n):\n    return n  # ü\n"
    ids = tokens.encode(text)[:32]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"][:32] == ids and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == stock.config.eos_token_id == tokens.separator
    ours = found.model()
    with torch.no_grad():
        mine = ours(torch.tensor([ids])).logits
        torch.testing.assert_close(stock(torch.tensor([ids])).logits, mine, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.bin"))
    if which == "moe_run":
        for name, buffer in stock.named_buffers():
            if name.endswith("e_score_correction_bias"):
                assert buffer.any()
                buffer.zero_()
        assert isinstance(ours, LanguageModel) and difference(ours, stock) > 1e-2


@pytest.mark.parametrize(
    "target",
    [
        mue.MoE.parse("8e2a", width=32, expert=16, layers=2, head_dim=16, kv_heads=1, sequence=32, router="softmax"),
        mue.MoE.parse("8e3a", width=32, expert=16, layers=2, head_dim=16, sequence=32),
        mue.Mixed(
            32, (mue.Block(layers=1, ffn=48), mue.Block(layers=2, experts=4, active=2, expert=16)),
            head_dim=16, sequence=32, tied=True,
        ),
        mue.MoE.parse(
            "8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=32, router="softmax",
            normalize=False, gates="measured", gate_moments=(0.3, 0.05),
        ),
    ],
    ids=["softmax", "sigmoid, none shared", "dense first, tied", "softmax, raw"],
)  # fmt: skip
def test_other_shapes(target: mue.MoE, domains: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, balance="none")
    folder = trained(domains, tmp_path / "run", target, settings=settings, steps=4)
    _, _, family, apart = exported(folder, tmp_path / "out")
    softmax = getattr(target, "router", "") == "softmax"
    assert family == ("qwen3_moe" if softmax else "lfm2_moe") and apart < 1e-4


REFUSED = {
    "groups": (mue.MoE.parse("8e4a2g", width=32, expert=16, layers=1, head_dim=16, sequence=32), {}, r"layers of 8e4a2g .*\(experts chosen a/g from each of 2 groups\)"),
    "pools": (
        mue.MoE.parse("8e2a1p", width=32, expert=16, layers=2, head_dim=16, sequence=32),
        {},
        "layers that share their experts of 8e2a1p",
    ),
    "gelu": (mue.Dense(32, 32, 1, head_dim=16, sequence=32, gated=False), {}, "a feed-forward without a gate"),
    "hash": (
        mue.MoE.parse("8e2a", width=32, expert=16, layers=1, head_dim=16, sequence=32, router="hash"),
        {},
        r"hash gates, 0 shared experts",
    ),
    "softmax with a balance bias": (
        mue.MoE.parse("8e2a", width=32, expert=16, layers=1, head_dim=16, sequence=32, router="softmax"),
        {"balance": "bias"},
        'a balance bias, and qwen3_moe has none; train with .run. balance = "loss"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_family_has_is_refused_and_nothing_is_written(case: str, domains: Path, tmp_path: Path) -> None:
    target, changes, words = REFUSED[case]
    settings: Settings = replace(SETTINGS, **{"balance": "none", **changes})
    found = find(trained(domains, tmp_path / "run", target, settings=settings, steps=2))
    with pytest.raises(ValueError, match=words) as refused:
        to_transformers(found, None, tmp_path / "new" / "out")
    assert "\n" not in str(refused.value) and "--model" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_another_model_than_ours_is_never_written(
    moe_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a router or a version of the library computes otherwise shows in the logits, which are compared on the way."""
    found = find(moe_run)

    def wrong(ours: LanguageModel, run: TrainedRun) -> Any:
        stock = stock_of(ours, run)
        with torch.no_grad():
            stock.model.layers[0].self_attn.q_proj.weight[:8].neg_()
        return stock

    monkeypatch.setattr("mue.lab.trained.to_transformers.stock_of", wrong)
    with pytest.raises(
        ValueError, match=r"no stock family computes what 8e2a1s d32 L2 does: as glm4_moe its logits differ"
    ):
        to_transformers(found, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    to_transformers(found, None, tmp_path / "out")
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="exists already"):
        to_transformers(found, None, tmp_path / "out")
