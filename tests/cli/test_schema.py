"""``mue schema``, and what a shell is told of the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mue.lab.schema import schema
from support.command_line import in_process, refused


def test_a_schema_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = in_process(capsys, monkeypatch, "schema", "sweep")
    assert code == 0 and json.loads(out) == schema("sweep")
    refused(in_process(capsys, monkeypatch, "schema", "swep"), "did you mean 'sweep'")


def test_the_shell_completes_commands() -> None:
    asked = {"_MUE_COMPLETE": "complete_bash", "COMP_WORDS": "mue sc", "COMP_CWORD": "1"}
    path = os.pathsep.join(filter(None, sys.path))
    call = [sys.executable, "-c", "import sys; sys.argv = ['mue']; from mue.cli import main; main()"]
    done = subprocess.run(
        call, env={**os.environ, **asked, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.split() == ["schema"], done.stderr
