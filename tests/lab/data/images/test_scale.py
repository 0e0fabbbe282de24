from __future__ import annotations

import numpy as np
import torch

from mue.lab.data.images.scale import numbers, to_bytes


def test_every_byte_comes_back_and_the_ends_are_one() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scaled = numbers(every)
    assert scaled.dtype == torch.float32 and (scaled.min(), scaled.max()) == (-1, 1)
    assert (scaled.flatten().diff() > 0).all() and (to_bytes(scaled) == every).all()


def test_what_lies_outside_is_cut_off() -> None:
    assert to_bytes(torch.tensor([-7.0, -1.0, 0.996, 1.0, 7.0])).tolist() == [0, 0, 254, 255, 255]
