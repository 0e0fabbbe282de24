"""Numbers and tables as people read them."""

from __future__ import annotations

import pytest

from mue.util.text import below_one, number, percent, text_table, wrapped, yaml_number


@pytest.mark.parametrize(
    ("value", "printed"), [(None, "–"), (0.0, "0"), (1 / 3, "0.3333"), (1e-12, "1e-12"), (123456, "1.235e+05")]
)
def test_four_significant_digits(value: float | None, printed: str) -> None:
    assert number(value) == printed


@pytest.mark.parametrize("value", [2e-5, 1e-12, 1e22, 5e-324, 1.5e-13, 0.001, 1e-3 / 3, 0.0, 1.0, -2e-7, 3])
def test_a_number_of_a_yaml_file_is_read_as_that_number(value: float) -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(f"lr: {yaml_number(value)}")["lr"]
    assert isinstance(found, float) and found == value
    assert isinstance(yaml.safe_load(f"lr: {2e-5!r}")["lr"], str)  # the control: as Python writes it


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_spaces() -> None:
    made = text_table(["role", "lr"], [["embedding", "1"], ["head", ""]])
    assert made.split("\n") == ["role       lr", "─────────  ──", "embedding  1", "head"]
    assert text_table(["role"], []).split("\n") == ["role", "────"]


def test_a_row_of_another_length_is_our_mistake() -> None:
    with pytest.raises((ValueError, IndexError)):
        text_table(["role", "lr"], [["head"]])


def test_rows_below_run_on_without_widening_a_column() -> None:
    made = text_table(["role", "lr", "eps"], [["head", "1", "2"]], [["a law of others", "refuses: too large"]])
    assert made.split("\n") == [
        "role             lr  eps",
        "───────────────  ──  ───",
        "head             1   2",
        "───────────────  ──  ───",
        "a law of others  refuses: too large",
    ]


def test_a_wrapped_value_goes_on_below_itself() -> None:
    assert wrapped("why  ", "one two-three four", 16) == "why  one\n     two-three\n     four"
    assert wrapped("why  ", "x" * 30, 16).endswith("x" * 30)


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.9, "0.9"),
        (0.95, "0.95"),
        (0.99995, "0.99995"),
        (0.99998437, "0.9999844"),
        (1 - 1e-9, "0.999999999"),
        (0.0, "0"),
        (1.0, "1"),
    ],
)
def test_the_distance_to_one_is_printed(value: float, printed: str) -> None:
    """Betas of 0.99995 and 0.99998 were printed as 1, and as each other."""
    assert below_one(value) == printed


@pytest.mark.parametrize(
    ("value", "printed"), [(0.123, "0.12"), (5.24, "5.2"), (99.4, "99"), (99.7, "100"), (100, "100"), (1234.5, "1,234")]
)
def test_a_percentage_is_never_a_power_of_ten(value: float, printed: str) -> None:
    assert percent(value) == printed
