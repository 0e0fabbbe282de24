"""mue.moe.routers.base: a router is one file, from anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import MoELayer, Router, Routing
from mue.moe.routers.base import ROUTER_CLASSES, BaseRouter, RouterInput, RouterOptions, build, router, share
from mue.shapes.routers import ROUTERS


@pytest.fixture
def first() -> Iterator[type[BaseRouter]]:
    """A router of one's own, registered for one test."""

    @router("first", even=True)
    class First(BaseRouter):
        def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
            return self.even(torch.arange(self.active).expand(x_TD.shape[0], -1))

    yield First
    for registry in (ROUTER_CLASSES, ROUTERS):
        registry._entries.pop("first")  # type: ignore[attr-defined]


def test_every_name_has_its_class_and_its_facts() -> None:
    assert tuple(ROUTER_CLASSES) == tuple(ROUTERS)
    for name in ROUTER_CLASSES:
        shape = mue.MoE.parse("8e1a", width=16, expert=8, layers=1, head_dim=16, router=name)
        with (
            pytest.warns(UserWarning, match="no gradient")
            if name in ("sigmoid", "softmax", "elastic", "group-limited")
            else torch.no_grad()
        ):  # a = 1: no gradient
            made = build(shape.blocks[0], 16, RouterOptions(route_scale=1.0))
        assert type(made) is ROUTER_CLASSES[name] and made.kind == ROUTERS[name]
        assert any(row.role == "router" for row in made.layout()) == made.kind.matrix
        assert {row.pattern for row in made.layout()} == {name for name, _ in made.named_parameters()}
        assert hasattr(made, "balance_bias") == made.kind.balance_bias


@pytest.mark.parametrize("given", [{"n_group": 2, "topk_group": 1}, {"renormalise": True}, {}], ids=str)
@pytest.mark.parametrize("name", ROUTER_CLASSES)
def test_what_a_block_says_of_its_sums_is_what_its_router_does(name: str, given: dict[str, object]) -> None:
    """In training, where a router may draw and drop; with other settings, where it has them."""
    if (given.keys() - ROUTERS[name].settings.keys()) or (name == "group-limited") != ("n_group" in given):
        pytest.skip("has no such settings, or needs them")
    shape = mue.MoE.parse("8e1a" if name == "thor" else "8e2a", width=16, expert=8, layers=1, head_dim=16, router=name, router_settings=given)  # fmt: skip
    made = build(shape.blocks[0], 16, RouterOptions(route_scale=3.0)).train()
    share([made])
    torch.nn.init.normal_(getattr(made, "weight", torch.empty(1)), 0, 0.2)
    routing = made(torch.randn(96, 16), RouterInput(torch.randint(256, (96,))))
    sum_T = torch.zeros(96).index_add(0, routing.token_P, routing.weight_P.detach())
    assert shape.blocks[0].exact_sum == torch.allclose(sum_T, torch.tensor(3.0), atol=1e-5)


def test_a_router_of_ones_own_is_planned_built_and_checked(first: type[BaseRouter]) -> None:
    shape = mue.MoE.parse("4e2a", width=32, expert=16, layers=2, head_dim=16, sequence=16, router="first")
    plan = mue.transfer(mue.Dense(32, 32, 2, head_dim=16), shape, mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1))
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(256, (2, 16))
    assert plan.roles["router"].count == 0
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    report = mue.check(model, plan, (tokens, tokens), optimizer)
    assert any(f.check == "gates" and f.status == "pass" for f in report.findings)
    assert model.blocks[0].moe(torch.randn(3, 32))[1].stats["load"].tolist() == [3, 3, 0, 0]


def test_a_name_is_taken_once(first: type[BaseRouter]) -> None:
    with pytest.raises(ValueError, match=r"router 'first' is there already \(.*First\)"):
        router("first", even=True)(type("Other", (BaseRouter,), {}))
    with pytest.raises(ValueError, match="unknown router 'frist'; did you mean 'first'"):
        build(mue.Block(layers=1, experts=4, active=2, expert=8, router="frist"), 8, RouterOptions())


def test_a_plugin_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """A package that is installed and never imported by hand: its router is known to shapes."""
    (tmp_path / "their_router.py").write_text(
        "from mue.moe.routers.base import BaseRouter, router\n"
        "@router('theirs', unit_sum=True)\nclass Theirs(BaseRouter): pass\n"
    )
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mue.plugins]\ntheirs = their_router\n")
    code = (
        "import mue; print(mue.Block(layers=1, experts=4, active=2, expert=8, router='theirs').router_kind.defined_in)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "their_router.Theirs"


def test_refusals_name_the_numbers_and_the_fix() -> None:
    with pytest.raises(ValueError, match="balance='bais' is unknown"):
        Router(8, 4, 2, balance="bais")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"router=4 is no router: give a mue\.moe\.Router"):
        MoELayer(8, 4, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hash router reads token ids"):
        ROUTER_CLASSES["hash"](8, 4, 2)(torch.randn(3, 8))
