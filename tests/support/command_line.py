"""The command line: as a process of its own, and, for the many error cases, in this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``mue`` with these arguments, on one thread and a wide terminal without colours, so that no line is broken in
    two.

    Args:
        cwd: the folder it is started in.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "mue", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=240, check=False)


def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """The same command without a new interpreter, for the many error cases."""
    from mue import cli

    monkeypatch.setattr(sys, "argv", ["mue", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def refused(found: tuple[int, str, str], *words: str) -> None:
    """A mistake's end: exit code 2 and one line that holds these words."""
    code, _, err = found
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


def in_encoding(
    encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, bytes, str]:
    """The same with a stdout of another encoding, and what it was sent as bytes."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    code, _, err = in_process(capsys, monkeypatch, *arguments)
    return code, raw.getvalue(), err
