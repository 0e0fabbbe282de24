"""mue.shapes.settings: what a router can be given, and that nothing wrong gets by."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.shapes import ROUTERS, Block, RouterKind, Setting
from mue.shapes.settings import Chosen, as_text

SETTINGS = {
    "p": Setting(default=0.4, low=0.0, high=1.0, low_open=True),
    "k": Setting(default=2, low=1),
    "norm": Setting(default=True),
    "mode": Setting(default="raw", choices=("raw", "unit")),
    "start": Setting(default=None, kind=float, low=0),
}


def fits(active: int, experts: int, settings: dict[str, object]) -> None:
    if settings["k"] > experts:  # type: ignore[operator]
        raise ValueError(f"k = {settings['k']} of {experts} experts")


@pytest.fixture(autouse=True)
def settable(monkeypatch: pytest.MonkeyPatch) -> Iterator[RouterKind]:
    kind = RouterKind(name="settable", unit_sum=True, settings=SETTINGS, losses={"entropy": 1e-3}, fits=fits)
    ROUTERS.register("settable")(kind)
    yield kind
    ROUTERS._entries.pop("settable")


def block(**settings: object) -> Block:
    return Block(layers=1, experts=8, active=2, expert=16, router="settable", router_settings=settings)


def test_only_what_differs_from_the_defaults_is_kept() -> None:
    said = block(p=0.4, k=2.0, norm=True, mode="raw", losses={"entropy": 1e-3})
    assert said == block() and hash(said) == hash(block()) and said.router_settings == {}
    assert block(p=0.3).router_settings == {"p": 0.3} != block().router_settings
    complete = {"p": 0.4, "k": 2, "norm": True, "mode": "raw", "start": None, "losses": {"entropy": 1e-3}}
    assert said.all_settings == complete
    assert block(losses={"entropy": 0, "router_z": 1}).all_settings["losses"] == {"entropy": 0, "router_z": 1}
    assert as_text(complete) == "p 0.4, k 2, norm true, mode raw, start found at init, losses (entropy 0.001)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 1}, "the settable router has no setting 'q'; known: p, k, norm, mode, start, losses"),
        ({"mod": "raw"}, "no setting 'mod'; did you mean 'mode'"),
        ({"p": 0}, "p of the settable router must be a number above 0 and at most 1, got 0"),
        ({"p": 1.1}, "above 0 and at most 1, got 1.1"),
        ({"p": "0.3"}, "got '0.3', which is text: leave the quotes out"),
        ({"p": True}, "must be a number above 0 and at most 1, got True"),
        ({"p": float("nan")}, "must be a number"),
        ({"k": 1.5}, "k of the settable router must be a whole number of at least 1, got 1.5"),
        ({"k": 9}, "k = 9 of 8 experts"),
        ({"norm": 1}, "norm of the settable router must be true or false, got 1"),
        ({"mode": "rew"}, "must be one of raw, unit, got 'rew'; did you mean 'raw'"),
        ({"losses": 1}, "must be a table of coefficients"),
        ({"losses": {"entropy": -1}}, "entropy among losses of the settable router must be at least 0"),
    ],
)
def test_what_a_router_cannot_be_given_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        block(**settings)
    assert "\n" not in str(error.value)


def test_settings_need_a_table_and_a_router() -> None:
    with pytest.raises(ValueError, match="settings of the settable router must be a table, got 3"):
        Block(layers=1, experts=8, active=2, expert=16, router="settable", router_settings=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need routed experts"):
        Block(layers=1, shared_experts=1, expert=16, router="settable", router_settings={"p": 0.3})
    with pytest.raises(ValueError, match="ffn beside router_settings"):
        Block(layers=1, ffn=16, router_settings={"p": 0.3})
    with pytest.raises(ValueError, match="the hash router has no scores"):
        Block(layers=1, experts=8, active=2, expert=16, router="hash", router_settings={"losses": {"entropy": 1}})
    with pytest.raises(ValueError, match="every router has a setting losses"):
        RouterKind(name="mine", settings={"losses": Setting(default=1.0)})
    for wrong in ({"default": None}, {"default": "a"}, {"default": 1.0, "choices": ("a",)}):
        with pytest.raises(ValueError, match="a setting is a float"):
            Setting(**wrong)  # type: ignore[arg-type]


def test_a_shape_with_settings_is_saved_hashed_and_copied(settable: RouterKind) -> None:
    numbers = {"width": 64, "expert": 16, "layers": 2, "router": "settable"}
    plain, said = (mue.MoE.parse("8e2a", router_settings=s, **numbers) for s in ({}, {"p": 0.3}))  # type: ignore[arg-type]
    assert "router_settings" not in plain.to_dict() and said.to_dict()["router_settings"] == {"p": 0.3}
    base, tuned = mue.Dense(64, 64, 2), mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)
    plans = [mue.transfer(base, shape, tuned) for shape in (plain, said)]
    assert plans[0].hash != plans[1].hash and "settable: p 0.3, k 2" in str(plans[1])
    for back in (pickle.loads(pickle.dumps(said)), copy.deepcopy(said), mue.shapes.shape_from_dict(said.to_dict())):
        assert back == said and hash(back) == hash(said)
    with pytest.raises(TypeError, match="do not change"):
        said.router_settings["p"] = 0.5  # type: ignore[index]


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(0, 1)))
def test_equal_settings_have_one_hash(values: dict[str, float]) -> None:
    backwards = dict(reversed(list(values.items())))
    assert hash(Chosen(values)) == hash(Chosen(backwards)) and Chosen(values) == Chosen(backwards)
