"""``mue inspect`` on a class of one's own with a JSON config: its own config class, numbers by name, and short errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mue.layouts.sources import source_of
from support.command_line import in_process, refused

pytest.importorskip("transformers", reason="the command observes models as the hf extra's")

MODEL = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Numbers:
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int = 2

class Declared(nn.Module):
    def __init__(self, config: Numbers):
        super().__init__()
        self.config = config
        assert type(config) is Numbers
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

class Named(Declared):
    def __init__(self, hidden_size, vocab_size, num_hidden_layers=2):
        super().__init__(Numbers(hidden_size, vocab_size, num_hidden_layers))

class Untold(Declared):
    def __init__(self, config):
        super().__init__(Numbers(config.hidden_size, config.vocab_size))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("inspected.py").write_text(MODEL)
    for name, numbers in {
        "right": {"hidden_size": 64, "vocab_size": 100},
        "partial": {"hidden_size": 64},
        "misspelt": {"hidden_size": 64, "vocab_sise": 100},
        "list": [64],
        "wrong": {"model_type": "qwen3_moe", "hidden_size": "abc"},
        "zero": {"model_type": "qwen3_moe", "num_attention_heads": 0},
    }.items():
        Path(f"{name}.json").write_text(json.dumps(numbers))
    Path("broken.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize("name", ["Declared", "Named", "Untold"])
def test_it_is_built_as_it_wants_to_be(name: str, here: Path) -> None:
    found = source_of(f"inspected.py:{name}", config="right.json")
    assert {n: tuple(p.shape) for n, p in found.model().named_parameters()} == {
        "embedding.weight": (100, 64),
        "head.weight": (100, 64),
    }
    assert {f.row.role for f in found.describe().patterns if f.row} == {"embedding", "head"}


WRONG = {
    ("Declared", "partial"): ("partial.json lacks 'vocab_size', which Numbers needs",),
    ("Named", "partial"): ("partial.json lacks 'vocab_size', which Named needs",),
    ("Untold", "partial"): ("inspected.py, line 27", "partial.json has no 'vocab_size'"),
    ("Declared", "misspelt"): ("Numbers knows no 'vocab_sise'; did you mean 'vocab_size'?",),
    ("Named", "misspelt"): ("Named knows no 'vocab_sise'; did you mean 'vocab_size'?",),
    ("Declared", "list"): ("list.json holds a list",),
    ("Declared", "broken"): ("broken.json is not JSON",),
    ("Declared", "nowhere"): ("nowhere.json does not exist",),
}


@pytest.mark.parametrize(("name", "config"), WRONG)
def test_what_is_wrong_with_a_config_is_one_line(
    name: str, config: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = in_process(capsys, monkeypatch, "inspect", f"inspected.py:{name}", "--config", f"{config}.json")
    refused(found, *WRONG[name, config])


@pytest.mark.parametrize(("config", "words"), [("wrong", "hidden_size"), ("zero", "ZeroDivisionError")])
def test_configs_that_transformers_refuses(
    config: str, words: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(in_process(capsys, monkeypatch, "inspect", f"{config}.json"), words)


def test_propose_prints_rows_to_paste(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.e, self.u, self.d = nn.Embedding(9, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)\n"
        "    def forward(self, ids):\n"
        "        x = self.e(ids)\n"
        "        return (x + self.d(self.u(x).relu())) @ self.e.weight.T\n"
        "def build():\n"
        "    return Tiny()\n"
    )
    call = ("inspect", f"{tmp_path}/train.py:build", "--propose")
    code, out, _ = in_process(capsys, monkeypatch, *call)
    assert code == 0 and 'mue.Layout("e.weight", "embedding", ("in", "out"))' in out
    assert "3 tensors in 3 rows, 3 decided" in out
    refused(in_process(capsys, monkeypatch, *call, "--measure-gates"), "--propose takes")
