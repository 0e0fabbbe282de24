from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from mue.lab.trained.images.likeness import copies, frechet, nearest


@given(seed=st.integers(0, 2**32 - 1), features=st.integers(1, 8), shift=st.floats(-3, 3))
def test_against_the_matrix_root_of_scipy(seed: int, features: int, shift: float) -> None:
    draw = np.random.RandomState(seed)
    one, other = (draw.randn(40, features) @ draw.randn(features, features) for _ in range(2))
    other = other + shift
    covariance = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other)]
    wanted = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
        covariance[0] + covariance[1] - 2 * sqrtm(covariance[0] @ covariance[1]).real
    )
    assert frechet(one, other) == pytest.approx(wanted, abs=1e-6 * (1 + abs(wanted)))
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    # it does not depend on the axes, and grows by the square of what the means are apart
    turn = np.linalg.qr(draw.randn(features, features))[0]
    assert frechet(one @ turn, other @ turn) == pytest.approx(wanted, abs=1e-6 * (1 + abs(wanted)))
    assert frechet(one, one + shift) == pytest.approx(features * shift**2, abs=1e-6)


def test_too_few_images_for_a_covariance() -> None:
    with pytest.raises(ValueError, match="a covariance of 5 features needs more than 5 images"):
        frechet(np.zeros((9, 5)), np.zeros((5, 5)))


def test_nearest_is_the_smallest_distance() -> None:
    draw = np.random.RandomState(0)
    images, known = (draw.randint(0, 256, (n, 1, 4, 4)).astype(np.uint8) for n in (300, 7))
    apart = (images.astype(float)[:, None] - known.astype(float)[None]) / 255
    assert nearest(images, known) == pytest.approx(np.sqrt((apart**2).mean((2, 3, 4)).min(1)))
    black, white = np.zeros((1, 1, 4, 4), np.uint8), np.full((1, 1, 4, 4), 255, np.uint8)
    assert nearest(white, black) == [1.0] and nearest(known, known) == pytest.approx(0, abs=1e-7)


def test_copies_are_seen_through_a_little_noise() -> None:
    draw = np.random.RandomState(0)
    train, held, fresh = (draw.randint(0, 256, (100, 1, 4, 4)).astype(np.uint8) for _ in range(3))
    noisy = np.clip(train.astype(int) + draw.randint(-8, 9, train.shape), 0, 255).astype(np.uint8)
    assert copies(noisy, held, train).share == 1
    assert copies(fresh, held, train).share < 0.2
