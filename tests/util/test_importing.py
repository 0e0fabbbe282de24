"""A user's own function by name: of a file, of a module, of a package."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.util.importing import imported


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
