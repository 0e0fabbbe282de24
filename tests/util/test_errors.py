"""Numbers from users: accepted as they are meant, or refused by name."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest

import mue
from mue.util.errors import CallError, explain_calls, nearest, positive, positive_int, true_or_false


@pytest.mark.parametrize("value", [1, 7, 10**18])
def test_a_whole_number_passes(value: int) -> None:
    assert positive_int("width", value) is value


@pytest.mark.parametrize("value", [np.int64(7), np.uint8(7), 7.0, np.float32(7), Fraction(7)])
def test_a_whole_number_of_any_kind_is_a_plain_one_afterwards(value: object) -> None:
    assert positive_int("width", value) == 7 and type(positive_int("width", value)) is int


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_number_of_any_kind_is_a_plain_one_afterwards(value: object) -> None:
    assert positive("lr", value) == 0.5 and type(positive("lr", value)) is float


def test_what_is_counted_one_by_one_has_a_limit_of_its_own() -> None:
    assert positive_int("layers", 100, most=100) == 100
    with pytest.raises(ValueError, match="layers must be at most 100, got a number of 3 digits"):
        positive_int("layers", 101, most=100)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("7", "'7', which is text: leave the quotes out"),
        ("1e-3", "'1e-3', which is text: leave the quotes out (in YAML: 0.001)"),
        ("2.5E5", "'2.5E5', which is text: leave the quotes out (in YAML: 250000.0)"),
        ("1e-7", "'1e-7', which is text: leave the quotes out (in YAML: 1.0e-07)"),
        ("seven", "'seven'"),
    ],
)
def test_a_number_that_is_text_is_told_how_to_be_one(value: str, words: str) -> None:
    for check in (positive, positive_int):
        with pytest.raises(ValueError, match=re.escape(f"got {words}") + "$"):
            check("lr", value)
    with pytest.raises(ValueError, match=r"got 'True', which is text: leave the quotes out"):
        true_or_false("gated", "True")


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.5, True, "seven", None, [1]])
def test_no_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"width must be a whole number of at least 1, got {value!r}")):
        positive_int("width", value)


def test_a_positive_number_is_a_float_afterwards() -> None:
    assert positive("lr", 2) == 2.0 and isinstance(positive("lr", 2), float)
    assert positive("decay", 0, zero=True) == 0 and positive("beta", 0.5, below=1) == 0.5


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {}, "lr must be greater than 0, got 0"),
        (-1, {"zero": True}, "lr must be at least 0, got -1"),
        (1, {"below": 1}, "lr must be greater than 0 and below 1, got 1"),
        (math.nan, {}, "lr must be a finite number, got nan"),
        (math.inf, {}, "lr must be a finite number, got inf"),
        (True, {}, "lr must be a finite number, got True"),
        ("1e-3", {}, "lr must be a finite number, got '1e-3'"),
        (10**400, {}, r"lr must be at most 10\^18, got a number of 401 digits"),
    ],
)
def test_what_is_no_such_number_is_refused_by_name(value: object, limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positive("lr", value, **limits)  # type: ignore[arg-type]


def test_a_number_beyond_any_shape_is_not_printed() -> None:
    with pytest.raises(ValueError, match=r"width must be at most 10\^18, got a number of 30 digits"):
        positive_int("width", 10**29)


def test_the_nearest_word_or_all_of_them() -> None:
    assert nearest("widht", ["width", "layers"]) == "; did you mean 'width'?"
    assert nearest("zzz", iter(["width", "layers"])) == "; known: width, layers"


CALLED = [name for name in mue.__all__ if callable(getattr(mue, name)) and name not in ("Plan", "get_rule")]


@pytest.mark.parametrize("name", CALLED)
def test_a_misspelt_keyword_names_the_nearest(name: str) -> None:
    """Whatever a user calls; plans are made by ``transfer``, and ``get_rule`` takes the options of any rule."""
    called = getattr(mue, name)
    for keyword, p in inspect.signature(called).parameters.items():
        if len(keyword) < 4 or p.kind is p.VAR_KEYWORD:
            continue
        wrong = keyword[:1] + keyword[2:]
        with pytest.raises(
            ValueError, match=rf"{name}\(\) got an unexpected keyword argument '{wrong}'; did you mean '{keyword}'"
        ):
            called(**{wrong: 1})


def test_what_is_missing_or_too_much_is_named() -> None:
    with pytest.raises(ValueError, match=r"Dense\(\) needs ffn and layers$"):
        mue.Dense(width=64)  # type: ignore[call-arg]
    with pytest.raises(CallError, match=r"HParams\(\) needs lr, weight_decay and init_std$"):
        mue.HParams()  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"Dense\(\) takes width, ffn, layers without a name, and got 4 values: name the others"
    ):
        mue.Dense(64, 64, 2, 16)  # type: ignore[misc, call-arg]
    with pytest.raises(ValueError, match=r"MoE\(\) .* did you mean 'width'"):
        mue.MoE.parse("8e2a", widht=64, expert=32, layers=2)


def test_an_error_from_inside_a_right_call_stays_itself() -> None:
    @explain_calls
    def fails(x: int) -> int:
        return x + "1"  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        fails(1)
    assert not isinstance(caught.value, CallError)
