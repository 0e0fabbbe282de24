"""``mue init``: flags, questions where a terminal is attached, and files that the other commands read."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.command_line import in_process, refused

BASE = "width=64,ffn=64,layers=2,head_dim=16,sequence=32"
DENSE, MOE = f"{BASE},kv_heads=2".replace("64,", "128,"), "8e2a1s,width=128,expert=64,layers=2,sequence=32"
VALUES = ("--lr", "4e-3", "--weight-decay", "0.1", "--init-std", "0.05")
RUN, LONG = ("--batch", "256", "--steps", "20"), ("--target-batch", "512", "--target-steps", "40")
MODEL = """
import mue
from mue.lab.models.language import LanguageModel

def small():
    return LanguageModel(mue.Dense(32, 64, 2, head_dim=16, sequence=24))

def big():
    return LanguageModel(mue.MoE.parse("4e2a", width=64, expert=32, layers=2, head_dim=16, sequence=24))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``mue`` with these arguments in a folder with a text and a model."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    Path("train.py").write_text(MODEL)

    def call(*arguments: object) -> tuple[int, str, str]:
        return in_process(capsys, monkeypatch, *arguments)

    return call


PLANS: dict[str, tuple[str, ...]] = {
    "dense to moe": ("--base", BASE, "--target", MOE, *VALUES),
    "dense to dense": ("--base", BASE, "--target", DENSE, *VALUES),
    "with runs": ("--base", BASE, "--target", MOE, *VALUES, *RUN, *LONG),
    "from models": ("--base", "train.py:small", "--target", "train.py:big,sequence=48", *VALUES),
    "own router": ("--base", BASE, "--target", f"{MOE},router=softmax,kv_heads=1", *VALUES),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_file_is_planned(name: str, here: Any) -> None:
    code, out, err = here("init", "plan", *PLANS[name])
    assert code == 0, err
    assert out.strip() == "wrote plan.toml: mue plan plan.toml"
    code, out, err = here("plan", "plan.toml")
    assert code == 0 and "lr" in out, err


def test_models_are_read(here: Any) -> None:
    here("init", "plan", "p.toml", *PLANS["from models"])
    text = Path("p.toml").read_text()
    assert "read from train.py:small" in text and "read from train.py:big" in text
    assert 'moe = "4e2a"' in text and "sequence = 48" in text and "ffn = 64" in text


@pytest.mark.parametrize("target", [(), ("--target", MOE), ("--target", MOE, *LONG), ("only target",)], ids=len)
def test_a_sweep_file_is_a_sweep(target: tuple[str, ...], here: Any) -> None:
    flags = ("--target", MOE) if target == ("only target",) else ("--base", BASE, *target)
    code, out, err = here("init", "sweep", *flags, "--batch", "4096", "--steps", "20", "--data", "text.txt")
    assert code == 0 and "mue sweep sweep.toml -o runs/sweep" in out, err
    code, out, err = here("sweep", "sweep.toml", "--dry-run")
    assert code == 0 and "10 runs of 20 steps with 4,096 tokens" in out, err
    assert not Path("runs/sweep").exists() and f"kept for the run itself, in {Path('runs/data').absolute()}" in out
    assert ("proposed from the target" in Path("sweep.toml").read_text()) == ("--base" not in flags)


@pytest.mark.parametrize("target", [(), ("--target", MOE, *LONG)], ids=["base", "target"])
def test_a_train_file_trains(target: tuple[str, ...], here: Any) -> None:
    code, _, err = here("init", "train", "--base", BASE, *VALUES, *RUN, *target, "--data", "text.txt")
    assert code == 0, err
    code, out, err = here(
        "train",
        "train.toml",
        "--set",
        "base.training.steps=2",
        *(["--set", "target.training.steps=2"] if target else []),
    )
    assert code == 0 and "report:" in out, err


def test_a_swept_file_leaves_the_values_to_the_sweep(here: Any) -> None:
    code, out, _ = here("init", "plan", "--swept", "--base", BASE, "--target", MOE)
    assert code == 0 and "--tuned FOLDER" in out and "[tuned]" not in Path("plan.toml").read_text()
    refused(
        here("init", "plan", "b.toml", "--swept", "--base", BASE, "--target", MOE, "--lr", "1"),
        "--lr would change nothing with --swept",
    )
    refused(here("plan", "plan.toml"), "needs a [tuned] table")


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nothing said": (("plan",), ("--base width=128", "--target 128e8a1s", "--lr", "--weight-decay", "--init-std")),
    "half a run": (("plan", "--base", BASE, "--target", MOE, *VALUES, "--batch", "256"), ("--steps", "--target-batch", "--target-steps")),
    "no data": (("train", "--base", BASE, *VALUES, *RUN), ("--data stdlib",)),
    "another kind": (("plam",), ("did you mean 'plan'",)),
    "both targets": (("plan", "--target", MOE, "--config", "x"), ("--target or --config",)),
    "no number": (("plan", "--base", "width=64,ffn", "--target", MOE, *VALUES), ("KEY=VALUE", "'ffn'")),
    "misspelt": (("plan", "--base", BASE.replace("ffn", "fnn"), "--target", MOE, *VALUES), ("unknown key 'fnn' in [base]", "'ffn'")),
    "no such model": (("plan", "--base", "train.py:smal", "--target", MOE, *VALUES), ("did you mean 'small'",)),
    "read off": (("plan", "--base", "train.py:small,width=9", "--target", MOE, *VALUES), ("width is read off the model",)),
    "never planned": (("plan", "--base", BASE, "--target", MOE, *VALUES[:4], "--init-std", "0"), ("init_std",)),
    "unread": (("plan", "--data", "x"), ("--data would change nothing in a plan file",)),
    "swept sweep": (("sweep", "--swept", "--base", BASE), ("leave it out",)),
    "not swept": (("sweep", "--base", BASE, *RUN, "--data", "t", "--init-std", "1"), ("--init-std would change nothing",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_and_writes_nothing(name: str, here: Any) -> None:
    arguments, words = WRONG[name]
    refused(here("init", *arguments), *words)
    assert not list(Path().glob("*.toml"))


def test_a_file_that_is_there_is_not_touched(here: Any) -> None:
    Path("plan.toml").write_text("mine")
    refused(here("init", "plan", *PLANS["dense to moe"]), "plan.toml exists and is not touched")
    assert Path("plan.toml").read_text() == "mine"


def test_in_a_terminal_it_asks(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is missing, in order, and for nothing else."""
    answers = iter([MOE, "0.1", "0.05"])
    asked: list[str] = []

    def prompt(text: str, type: Any) -> Any:
        asked.append(text.partition(" ")[0])
        return type(next(answers))

    monkeypatch.setattr("typer.prompt", prompt)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    code, _, err = here("init", "plan", "--base", BASE, "--lr", "1e-3")
    assert code == 0, err
    assert asked == ["target", "weight-decay", "init-std"]
    assert here("plan", "plan.toml")[0] == 0


def test_from_a_transformers_config(here: Any) -> None:
    pytest.importorskip("transformers", reason="model families need the hf extra")
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    ).save_pretrained("model")  # fmt: skip
    for i, said in enumerate(("--config", "--target")):
        flags = (said, "model/config.json", "--steps", "20", "--data", "text.txt")
        refused(here("init", "sweep", f"{i}.toml", *flags, "--batch", "256"), "not a whole number of sequences of 1024")
        code, _, err = here("init", "sweep", f"{i}.toml", *flags, "--batch", "2048")
        text = Path(f"{i}.toml").read_text()
        assert (
            code == 0 and "; Qwen3MoeConfig: how long its training sequences are is not said, 1024 is taken" in text
        ), err
        assert 'moe = "8e2a"' in text and "kv_heads = 8" in text and "width = 32 " in text
        assert here("sweep", f"{i}.toml", "--dry-run")[0] == 0
        refused(
            here("sweep", f"{i}.toml", "--dry-run", "--set", "base.sequence=999"), "not a whole number of sequences"
        )


def test_what_was_taken_for_granted_is_printed_and_a_sequence_fits_its_config(here: Any) -> None:
    """A config whose positions end below the usual sequence gets no longer one."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 256,
    }
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64}
    Path("config.json").write_text(json.dumps(config))
    pytest.importorskip("transformers")
    code, _, said = here("init", "plan", "--base", BASE, "--config", "config.json", *VALUES)
    assert code == 0 and "note: [target] read from config.json" in said and "64 is taken" in said
    assert tomllib.loads(Path("plan.toml").read_text())["target"]["sequence"] == 64
    Path("config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    assert here("init", "plan", "long.toml", "--base", BASE, "--config", "config.json", *VALUES)[0] == 0
    assert tomllib.loads(Path("long.toml").read_text())["target"]["sequence"] == 1024
