from __future__ import annotations

import numpy as np
import pytest
import torch

from mue.lab.data import ImageSet, load_images
from mue.lab.trained.images.classifier import FEATURES, Classifier, accuracy, train_classifier
from mue.lab.trained.images.score import score


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images("digits")


@pytest.fixture(scope="module")
def classifier(digits: ImageSet) -> Classifier:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained = train_classifier(digits)
    assert (torch.get_rng_state() == before).all()  # a run beside it draws what it would have drawn
    return trained


def test_it_is_right_on_digits_that_were_held_out(digits: ImageSet, classifier: Classifier) -> None:
    assert accuracy(classifier, digits) >= 0.97
    assert FEATURES <= 16 and classifier.judge(digits.held_out)[1].shape == (len(digits.held_out), FEATURES)


def test_scores_of_held_out_images_and_their_controls(digits: ImageSet, classifier: Classifier) -> None:
    images, label = digits.held_out, digits.held_out_class
    right = score(images, label, digits, classifier)
    assert right.asked[0] == right.accuracy and right.asked[1] < right.asked[0] < right.asked[2]
    assert right.distance == right.floor and 0 < right.floor < 0.5
    assert right.copies.share == pytest.approx(0.05, abs=0.01)
    # The controls: another class than the one asked for; noise; a sampler that gives training images back.
    wrong = score(images, (label + 1) % 10, digits, classifier)
    assert wrong.asked[2] < 0.1
    noise = np.random.RandomState(0).randint(0, 256, images.shape).astype(np.uint8)
    far = score(noise, label, digits, classifier)
    assert far.distance is not None and far.distance > 10 * right.floor and far.asked[2] < 0.5 and far.copies.share == 0
    copied = score(digits.train[:100], digits.train_class[:100], digits, classifier)
    assert copied.copies.share == 1 and copied.copies.closest == 0
    # of one class alone, which a look at a few samples does not show
    ones = digits.train[digits.train_class == 1]
    collapsed = score(ones, np.ones(len(ones), np.int64), digits, classifier)
    assert collapsed.distance is not None and collapsed.distance > 10 * right.floor and collapsed.asked[0] > 0.9


def test_too_few_samples_have_no_distance(digits: ImageSet, classifier: Classifier) -> None:
    few = score(digits.held_out[:FEATURES], digits.held_out_class[:FEATURES], digits, classifier)
    assert few.distance is None and few.floor is None and few.asked[0] > 0.5


def test_one_class_is_none_to_tell_apart() -> None:
    image = np.zeros((4, 1, 8, 8), np.uint8)
    one = ImageSet(image, np.zeros(4, np.int64), image, np.zeros(4, np.int64), ("cat",), "0")
    with pytest.raises(ValueError, match="needs two classes or more, and the images are all 'cat'"):
        train_classifier(one)
