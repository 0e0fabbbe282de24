"""``mue generate``: text that streams, and one line for what cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.command_line import in_process, refused
from support.trained import dense_run_of_words, moe_run_of_bytes


@pytest.fixture(scope="module")
def bytes_run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_run_of_bytes(texts, tmp_path_factory.mktemp("bytes"))


def test_it_writes_on(
    bytes_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = dense_run_of_words(texts, tmp_path, steps=2)
    for folder in (bytes_run.parent.parent, words):
        texts_of = []
        for more in (("--seed", "1"), ("--seed", "1"), ("--seed", "2", "--top-p", "0.9")):
            code, out, err = in_process(
                capsys, monkeypatch, "generate", folder, "def fib(", "-n", "30", "--temperature", "1", *more
            )
            assert code == 0, err
            assert out.startswith("def fib(") and len(out) > 15 and "\x1b" not in out
            assert " tokens, " in err and "run " in err
            texts_of.append(out)
        assert texts_of[0] == texts_of[1] != texts_of[2]


def test_what_cannot_be_is_one_line(
    bytes_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "runs" / bytes_run.name
    shutil.copytree(bytes_run, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for words, arguments in {
        ("keeps no weights", "mue train"): (bare, "a"),
        ("keep", "weights", "--keep-weights"): (tmp_path, "a"),
        ("does not exist",): (tmp_path / "elsewhere", "a"),
        ("top-p", "at most 1"): (bytes_run, "a", "--top-p", "1.5"),
        ("temperature",): (bytes_run, "a", "--temperature", "-1"),
        ("--tokenizer", "bytes"): (bytes_run, "a", "--tokenizer", "t.json"),
    }.items():
        refused(in_process(capsys, monkeypatch, "generate", *arguments), *words)
