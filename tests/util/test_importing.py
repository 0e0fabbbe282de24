"""A user's own function by name: of a file, of a module, of a package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import mue
from mue.util import importing
from mue.util.errors import positive_int
from mue.util.importing import UserCodeError, imported, not_taken, user_code


def test_each_way_to_name_it(tmp_path: Path) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    width: int = 8\n", encoding="utf-8"
    )
    assert imported(f"{file}:Mine")().width == 8
    assert imported("math:sqrt")(9) == imported("math.sqrt")(9) == 3


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "models.py"
    file.write_text("def build():\n    return 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"models\.py has no 'biuld'; did you mean 'build'\?"):
        imported(f"{file}:biuld")
    with pytest.raises(ValueError, match=r"none\.py does not exist; give MODEL as file\.py:function"):
        imported(f"{tmp_path / 'none.py'}:build")
    with pytest.raises(ValueError, match=r"no_such_package cannot be imported .*give MODEL as file"):
        imported("no_such_package:build")


def test_a_file_sees_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python file.py`` does, wherever it is started; and of two neighbours of one name each file has its own folder's first."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"neighbour_{folder}.py").write_text(f"WHO = {folder!r}\n")
        (tmp_path / folder / "entry.py").write_text(f"from neighbour_{folder} import WHO\n")
    assert imported(f"{tmp_path}/one/entry.py:WHO") == "one"
    monkeypatch.chdir(tmp_path / "two")
    assert imported("entry.py:WHO") == "two"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "entry_three.py").write_text("import neighbour_three\n")
    with pytest.raises(UserCodeError, match="neighbour_three"):  # the negative control
        imported("entry_three:x")


BROKEN = {
    "from no_such_neighbour import x": "`from no_such_neighbour import x`: ModuleNotFoundError: No module named 'no_such_neighbour'",
    "x = (": "`x = (`: SyntaxError: '(' was never closed",
    "x = 1 / 0": "`x = 1 / 0`: ZeroDivisionError: division by zero",
    "raise SystemExit('usage: broken')": ": SystemExit: usage: broken",
    "import json; json.loads('{')": "`: JSONDecodeError: Expecting",  # raised in another package, and their line is named
    "raise ValueError('a\\n  b' + 'c' * 500)": ": ValueError: a b" + "c" * 297 + "…",
}


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("form", ["broken.py:build", "broken:build"])
def test_what_their_code_raises_is_one_line_with_theirs(
    line: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    importlib.invalidate_caches()
    Path("broken.py").write_text(f"# mine\n{line}\n")
    with pytest.raises(UserCodeError) as found:
        imported(form)
    assert "broken.py, line 2, `" in str(found.value) and BROKEN[line] in str(found.value)
    assert "\n" not in str(found.value) and found.value.__cause__ is not None


def test_an_interrupt_is_none_of_their_mistakes() -> None:
    with pytest.raises(KeyboardInterrupt), user_code("theirs"):
        raise KeyboardInterrupt


OURS = """
import mue
from mue.lab.models.language import LanguageModel
def build(plan):
    model = LanguageModel(mue.Dense(32, 64, 2, head_dim=16), plan.multipliers)
    plan.init_(model)
"""


def test_an_answer_of_ours_keeps_its_lines_and_gets_theirs(tmp_path: Path) -> None:
    """It lists every fault of their model: cut after three hundred characters it would be half an answer."""
    shape = mue.Dense(64, 64, 2, head_dim=16)
    plan = mue.transfer(shape, shape, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1))
    (tmp_path / "answered.py").write_text(OURS)
    with pytest.raises(UserCodeError) as found, user_code("answered.py:build"):
        imported(f"{tmp_path / 'answered.py'}:build")(plan)
    text = str(found.value)
    assert (
        "answered.py, line 6, `plan.init_(model)`: this model is not the planned" in text and "ValueError" not in text
    )
    assert text.count("\n") > 3 and str(found.value.__cause__) in text


def test_an_answer_of_ours_to_code_of_nobodys_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_installed", lambda: (str(Path(__file__).parent),))  # this file is nobody's
    with pytest.raises(ValueError, match=r"^width must be") as found, user_code("nobody"):
        positive_int("width", 0)
    assert not isinstance(found.value, UserCodeError)


def test_what_a_call_does_not_take_is_said_without_calling_it() -> None:
    def build(plan: object) -> None:
        raise AssertionError("called")

    assert not_taken(build, 1) == "" and "missing" in not_taken(build) and "too many" in not_taken(build, 1, 2)
    assert "not a callable" in not_taken(3) and not_taken(dict.fromkeys, 1) == ""
