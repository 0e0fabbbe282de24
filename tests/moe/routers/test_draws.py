"""mue.moe.routers.draws: uniform, independent of each other, and a function of their keys alone."""

from __future__ import annotations

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mue.moe.routers.draws import bits, uniform

COUNT = 1 << 16


def splitmix(seed: int, count: int) -> list[int]:
    """SplitMix64 in Python's own integers, as its authors define it: the oracle of the mixing and its wrap-around."""
    out, state, mask = [], seed, (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_one_key_is_splitmix() -> None:
    for key in (0, 1, 12345, 2**40 + 7):
        assert int(bits(key)) == splitmix(key, 1)[0] & (2**63 - 1)
    assert int(bits(1)) != int(bits(2))  # negative control


def test_keys_broadcast_and_their_order_counts() -> None:
    table = bits(3, torch.arange(4)[:, None], torch.arange(5))
    assert table.shape == (4, 5) and int(table[2, 3]) == int(bits(3, 2, 3)) != int(bits(3, 3, 2))
    assert table.unique().numel() == 20
    assert int(bits(-1)) >= 0 and int(bits(2**70 + 5)) == int(bits(5))  # any whole number is a key


def test_numbers_are_uniform_and_neighbours_are_independent() -> None:
    """Of consecutive counters, where a weak hash shows: mean, variance, each of 16 bins, and correlation, all within 4σ."""
    for draw in (uniform(7, torch.arange(COUNT)), uniform(torch.arange(COUNT), 7)):
        assert draw.min() >= 0 and draw.max() < 1
        assert abs(float(draw.mean()) - 0.5) < 4 / math.sqrt(12 * COUNT)
        load = torch.histc(draw, 16, 0, 1)
        assert (load - COUNT / 16).abs().max() < 4 * math.sqrt(COUNT / 16)
        for lag in (1, 2, 64):
            pairs = torch.stack((draw[lag:], draw[:-lag]))
            assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(COUNT)
    counter = torch.arange(COUNT).float() / COUNT  # negative control: a counter itself is uniform, and correlated
    assert float(torch.corrcoef(torch.stack((counter[1:], counter[:-1])))[0, 1]) > 0.9


def test_numbers_of_python_are_mixed_like_tensors() -> None:
    """In whatever place they stand, negative ones and those beyond an int64 too; other keys are other bits (the control)."""
    for keys in ((0,), (3, 5), (-1, 7, 2**70 + 3), (2**63 - 1, -(2**40))):
        plain = bits(*keys)
        first, *rest = (key % (1 << 63) for key in keys)
        assert plain == bits(torch.tensor(first), *rest) == bits(*(torch.tensor(key) for key in (first, *rest)))
        # of one number a tensor is read as Python's, of several never
        assert plain == bits(torch.tensor([first]), *rest) == bits(*(torch.tensor([key]) for key in (first, *rest)))
        assert plain != bits(first + 1, *rest)


def test_a_negative_tensor_is_the_same_key_with_or_without_an_axis() -> None:
    for key in (-1, -(2**62), 5):
        assert bits(3, torch.tensor(key), 7) == bits(3, torch.tensor([key]), 7) != bits(3, torch.tensor(key + 1), 7)


def test_under_an_observer_tensors_stay_tensors() -> None:
    """Such as have no data cannot be read, and are not."""
    with FakeTensorMode():
        assert bits(3, torch.zeros((), dtype=torch.int64), torch.arange(4)).shape == (4,)
    assert bits(3, torch.zeros((), dtype=torch.int64, device="meta"), device=torch.device("meta")).device.type == "meta"
