"""Samples scored by images that were held out: likeness, class, copies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.lab.data import ImageSet
from mue.lab.trained.images.classifier import FEATURES, Classifier, accuracy
from mue.lab.trained.images.likeness import Copies, copies, frechet
from mue.util.statistics import share_interval


@dataclass(frozen=True)
class SampleScores:
    """What is said of samples.

    Attributes:
        count: samples. distance: their Fréchet distance to the training images in the classifier's features, each in units of its spread over
            those; None where there are too few of them. floor: that of the held-out images, which no sampler can be expected to beat.
        asked: the share of samples whose class, by the classifier, is the one asked for, with its 95 % interval. accuracy: of the classifier on
            held-out images: what ``asked`` cannot be expected to exceed.
        copies: distances to the nearest training image.
    """

    count: int
    distance: float | None
    floor: float | None
    asked: tuple[float, float, float]
    accuracy: float
    copies: Copies

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the name of the feature space, so that nobody takes the distance for another."""
        return {
            **asdict(self),
            "asked": list(self.asked),
            "features": f"{FEATURES} features of a classifier of these images",
        }


def score(
    samples: npt.NDArray[np.uint8], class_N: npt.NDArray[np.int64], data: ImageSet, classifier: Classifier
) -> SampleScores:
    """Score samples.

    Args:
        samples: (N, C, H, W). class_N: the class asked for, of each. data: what their model was trained on. classifier: trained on it, too.
    """
    drawn, feature_NF = classifier.judge(samples)
    known, held = (classifier.judge(images)[1] for images in (data.train, data.held_out))
    spread_F = known.std(0)  # in its units distances do not depend on how large a classifier's features happen to be
    known, held, feature_NF = (features / spread_F for features in (known, held, feature_NF))
    enough = min(len(feature_NF), len(held)) > FEATURES
    return SampleScores(
        count=len(samples),
        distance=frechet(feature_NF, known) if enough else None,
        floor=frechet(held, known) if enough else None,
        asked=share_interval(int((drawn == class_N).sum()), len(samples)),
        accuracy=accuracy(classifier, data),
        copies=copies(samples, data.held_out, data.train),
    )
