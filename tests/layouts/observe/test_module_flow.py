"""What modules are given, on a small model of two inputs in which every answer is known."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from mue.layouts.observe.module_flow import ModuleFlow, module_flows


class Two(nn.Module):
    """``image`` and ``time`` meet in ``mixed``; ``out`` reads two things side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.clock = nn.Linear(4, 8), nn.Linear(2, 8)
        self.modulation, self.mixed, self.idle = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(4, 4)
        self.out = nn.Linear(24, 4)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x, c = self.eye(image), self.clock(time)
        shift, scale, gate = self.modulation(c)[:, None].chunk(3, dim=-1)
        hidden = self.mixed(x * scale + shift)
        return self.out(torch.cat([x * gate, hidden], -1))


def test_what_each_module_reads_joins_and_cuts() -> None:
    torch.manual_seed(0)
    model, given = Two(), {"image": torch.randn(2, 3, 4), "time": torch.randn(2, 2)}
    before = [p.clone() for p in model.parameters()]
    flows = module_flows(model, lambda keywords: model(**keywords), given, {"image": "image", "time": "time"})
    image, time = frozenset({"image"}), frozenset({"time"})
    assert flows == {
        "eye": ModuleFlow(image, raw=True),
        "clock": ModuleFlow(time, raw=True),
        "modulation": ModuleFlow(time, cut=3),
        "mixed": ModuleFlow(image | time),
        "out": ModuleFlow(image | time, joined=(8, 16)),
    }
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Passing(nn.Module):
    """What ``first`` makes is dropped at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept = nn.Linear(8, 8), []

    def forward(self, image: Tensor) -> Tensor:
        made = self.first(image)
        seen, total = weakref.ref(made), made.sum()
        del made
        self.kept.append(seen() is not None)
        return total


def test_nothing_comes_to_lie_where_an_output_lay() -> None:
    """Its memory would come to hold something else, and that would pass for it when it is cut."""
    model = Passing()
    model(torch.randn(2, 8))
    module_flows(model, lambda keywords: model(**keywords), {"image": torch.randn(2, 8)}, {"image": "image"})
    assert model.kept[:2] == [False, True]


def test_an_input_of_no_kind_is_not_asked_for() -> None:
    """The control: what is not changed is not seen to be read."""
    model, given = Two(), {"image": torch.randn(2, 3, 4), "time": torch.randn(2, 2)}
    flows = module_flows(model, lambda keywords: model(**keywords), given, {"image": "image"})
    assert flows["clock"].reads == frozenset() and flows["mixed"].reads == {"image"}
