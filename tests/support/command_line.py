"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest


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
    code, _, err = found
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
