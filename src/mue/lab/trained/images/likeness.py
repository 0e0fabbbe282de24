"""How like two sets of images are: a Fréchet distance between their features, and whether images of one are copies of the other's.

Shape suffixes: N images, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]
_AT_ONCE = 256  # images whose distances to all others are in memory


def frechet(one_NF: Features, other_NF: Features) -> float:
    """The Fréchet distance of two sets of features, each taken for a normal distribution, squared (Dowson & Landau 1982; 1706.08500, eq. 6).

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½).

    Args:
        one_NF, other_NF: more images than features each, since a covariance of fewer has directions in which it knows nothing.

    Raises:
        ValueError: too few images.
    """
    for features in (one_NF, other_NF):
        if len(features) <= features.shape[1]:
            raise ValueError(f"a covariance of {features.shape[1]} features needs more than {len(features)} images")
    means = [features.mean(0) for features in (one_NF, other_NF)]
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (one_NF, other_NF))
    root = _root(first)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def _root(covariance: Features) -> Features:
    """The symmetric square root of a covariance."""
    value, vector = np.linalg.eigh(covariance)
    out: Features = (vector * np.sqrt(np.clip(value, 0, None))) @ vector.T
    return out


def nearest(images: npt.NDArray[np.uint8], known: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The distance of each image to the nearest of those known: root mean square over pixels, where black and white are 1 apart."""
    flat, others = (a.reshape(len(a), -1).astype(np.float64) / 255 for a in (images, known))
    squares, out = (others**2).sum(1), np.empty(len(flat))
    for i in range(0, len(flat), _AT_ONCE):
        part = flat[i : i + _AT_ONCE]
        apart = (part**2).sum(1)[:, None] + squares - 2 * part @ others.T
        out[i : i + len(part)] = np.sqrt(np.clip(apart.min(1), 0, None) / flat.shape[1])
    return out


@dataclass(frozen=True)
class Copies:
    """Whether samples lie nearer to what was trained on than images do that were held out.

    Attributes:
        samples, held_out: the median distance to the nearest training image (:func:`nearest`). closest: the smallest of a sample's.
        threshold: below it are 5 % of the held-out images. share: of the samples that are below it: about 0.05 where samples are no copies.
    """

    samples: float
    held_out: float
    closest: float
    threshold: float
    share: float


def copies(samples: npt.NDArray[np.uint8], held_out: npt.NDArray[np.uint8], train: npt.NDArray[np.uint8]) -> Copies:
    """Compare samples' distances to their nearest training image with those of held-out images."""
    own, theirs = nearest(samples, train), nearest(held_out, train)
    threshold = float(np.quantile(theirs, 0.05))
    return Copies(
        float(np.median(own)), float(np.median(theirs)), float(own.min()), threshold, float((own < threshold).mean())
    )
