"""``mue export-weights``: a folder that is whole, or none."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.command_line import in_process, refused
from support.trained import moe_run_of_bytes


def test_it_writes_a_checkpoint_or_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="stock families are the hf extra's")
    run, out = moe_run_of_bytes(texts, tmp_path / "run", steps=2), tmp_path / "new" / "out"
    bare = tmp_path / "bare" / "runs" / run.name
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for words, arguments in {
        ("'transfomers'", "did you mean 'transformers'"): (run, "--to", "transfomers"),
        ("--tokenizer is for --to transformers",): (run, "--to", "mue", "--tokenizer", "words.json"),
        ("keeps no weights",): (bare, "--to", "transformers"),
    }.items():
        refused(in_process(capsys, monkeypatch, "export-weights", *arguments, "-o", out), *words)
    real = builtins.__import__

    def lacking(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *more)

    with monkeypatch.context() as without:
        without.setattr("importlib.import_module", lacking)
        refused(in_process(capsys, without, "export-weights", run, "--to", "transformers", "-o", out), "mue[hf]")
    assert not out.parent.exists()
    code, said, err = in_process(capsys, monkeypatch, "export-weights", run, "--to", "transformers", "-o", out)
    assert code == 0, err
    assert "as glm4_moe" in said and {p.name for p in out.iterdir()} >= {"model.safetensors", "tokenizer.json"}
    refused(in_process(capsys, monkeypatch, "export-weights", run, "--to", "transformers", "-o", out), "exists already")
    assert "under way" not in said
    (run / "model.safetensors").rename(run / "checkpoint.safetensors")
    again = tmp_path / "checkpoint"
    code, said, err = in_process(capsys, monkeypatch, "export-weights", run, "--to", "transformers", "-o", again)
    assert code == 0 and f"run {run.name}, under way, as glm4_moe" in said, err
