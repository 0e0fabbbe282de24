"""A small classifier of images: an independent judge of what a model drew, and the feature space in which sets of images are compared.

Shape suffixes: N images, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.lab.data import ImageSet
from mue.lab.data.images.scale import numbers

FEATURES = 16
"""As many as a covariance of a few hundred held-out images can fill."""
_STEPS, _BATCH, _LR, _SHIFT = 1000, 64, 4e-3, 1
_AT_ONCE = 1024  # images


class Classifier(nn.Module):
    """Two convolutions, a layer of :data:`FEATURES` features, and the classes. Images of 8 to 64 pixels.

    Args:
        shape: (C, H, W). classes: how many.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, *size = shape
        # halved until about four pixels are left on a side, so that the features of a large image are not of single pixels
        halvings = max(1, round(math.log2(max(8, *size) / 4)))
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
        for i in range(halvings):
            layers += [nn.Conv2d(32 if i else 16, 32, 3, stride=2, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            width = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.features = nn.Linear(width, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes and features, before their ReLU, of pixels in [-1, 1]."""
        feature_NF = self.features(self.convolutions(x_NCHW))
        return self.head(F.relu(feature_NF)), feature_NF

    @torch.no_grad()
    def judge(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Class (N,) and features (N, F) of images (N, C, H, W)."""
        parts = [self(numbers(images[i : i + _AT_ONCE])) for i in range(0, len(images), _AT_ONCE)]
        logits, features = (torch.cat(many) for many in zip(*parts, strict=True))
        return logits.argmax(1).numpy(), features.double().numpy()


def train_classifier(data: ImageSet, *, seed: int = 0) -> Classifier:
    """Train a classifier on what a model was trained on; it sees nothing of any model, and nothing that is held out.

    Images are moved by up to one pixel, which stands in for more of them. The same seed gives the same classifier, whatever was drawn
    from torch's generator before.

    Args:
        data: with two classes or more. seed: of init and order.

    Raises:
        ValueError: there is one class.
    """
    if len(data.classes) < 2:
        raise ValueError(f"a classifier needs two classes or more, and the images are all {data.classes[0]!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(data.shape, len(data.classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
        padded = F.pad(numbers(data.train), (_SHIFT,) * 4, mode="replicate")
        label_N = torch.from_numpy(data.train_class)
        _, H, W = data.shape
        for _ in range(_STEPS):
            chosen = torch.randint(len(padded), (_BATCH,))
            top, left = torch.randint(2 * _SHIFT + 1, (2,)).tolist()
            loss = F.cross_entropy(model(padded[chosen, :, top : top + H, left : left + W])[0], label_N[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: Classifier, data: ImageSet) -> float:
    """The share of the held-out images that it gives their class."""
    return float((model.judge(data.held_out)[0] == data.held_out_class).mean())
