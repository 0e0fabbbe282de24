"""mue doctor: what it says is what the MoE layer does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mue.kernels import build, library
from mue.lab.doctor.report import backend_states, render
from mue.moe.experts import BACKENDS


def test_report_names_every_backend_and_measures_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mue import cli

    monkeypatch.setattr(
        sys, "argv", ["mue", "doctor", "--json", "--seconds", "0", *(["--build"] if build.compiler() else [])]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == set(BACKENDS)
    assert report["machine"]["torch"] == torch.__version__
    measured = set(BACKENDS) if build.compiler() else set(BACKENDS) - {"native"}
    assert len(report["ratio"]) >= 2
    for found in report["ratio"].values():
        assert set(found) == measured
        # Times of a dense feed-forward layer of equal active width: nobody is that much faster or slower.
        assert all(0.01 < ratio < 1000 for ratio in found.values()), found
    text = render(report)
    assert all(name in text for name in BACKENDS) and "bfloat16" in text


def test_a_missing_kernel_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    library.forget()
    try:
        words = backend_states()
    finally:
        library.forget()
    assert "mue doctor --build" in words["native"] and words["native"].startswith("not active")
    assert not list(tmp_path.iterdir())  # looking builds nothing
