"""mue doctor: what it says is what the MoE layer does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mue.kernels import build, library
from mue.lab.doctor import doctor
from mue.lab.doctor.bench import median_ratio, ratios, upper_bound
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
    text = "\n".join(doctor.lines(report))
    assert all(name in text for name in BACKENDS) and "bfloat16" in text


def test_a_missing_kernel_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    library.forget()
    try:
        words = doctor.backends()
    finally:
        library.forget()
    assert "mue doctor --build" in words["native"] and words["native"].startswith("not active")
    assert not list(tmp_path.iterdir())  # looking builds nothing


def test_statistics_of_rounds() -> None:
    """Ratios pair rounds of one index, also where one took part in fewer; the bound lies above the median."""
    assert ratios([2.0, 9.0], [1.0, 3.0, 100.0]) == [2.0, 3.0]
    assert median_ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0]) == 2.0
    sample = sorted(torch.randn(101, generator=torch.Generator().manual_seed(0)).tolist())
    assert sample[50] < upper_bound(sample) < sample[-1]
    assert upper_bound([1.0, 2.0, 3.0]) == 3.0
    below = 0  # the bound covers the true median in 95 % of samples, and not always
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        below += upper_bound(sorted(torch.randn(40, generator=generator).tolist())) < 0
    assert 0.01 < below / 2000 < 0.06
