"""mue.lab.doctor.timing: what the rounds of a measurement say."""

from __future__ import annotations

import torch

from mue.lab.doctor.timing import median_ratio, ratios, upper_bound


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
