"""docs/install.md: versions and extras are those of pyproject.toml, and nobody sends to a package index that lacks us."""

from __future__ import annotations

import re
import tomllib

import mue
from support.pages import commands, fences, name, pages
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
FROM_AN_INDEX = re.compile(
    r"(?:pip install|uv add)[^\n`]*?['\" ]mue(?:\[[\w,{}]+\])?['\"]?(?=$|[ `'\"\n)])(?! @)", re.M
)


def test_versions_are_the_projects() -> None:
    assert PROJECT["requires-python"] == ">=3.11" and "Python 3.11 or newer" in PAGE
    (torch,) = (need for need in PROJECT["dependencies"] if need.startswith("torch"))
    assert torch == "torch>=2.11,<2.14" and torch in PAGE and "torch 2.11 up to 2.13" in PAGE
    assert f"mue-{mue.__version__}-py3-none-any.whl" in PAGE and PROJECT["version"] == mue.__version__


def test_every_extra_has_its_line() -> None:
    table = PAGE.partition("## Extras")[2].partition("##")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]+) \|", table, flags=re.M)))
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])


def test_nothing_of_ours_comes_from_a_package_index() -> None:
    texts = {name(path): path.read_text(encoding="utf-8") for path in pages()}
    texts |= {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    assert [where for where, text in texts.items() if FROM_AN_INDEX.search(text)] == []
    for wrong in ("pip install mue", "pip install 'mue[lab]'", "`pip install mue`", "uv add torch mue\n"):
        assert FROM_AN_INDEX.search(wrong), wrong
    for right in ("pip install 'mue[lab] @ git+<repository>'", "pip install -e 'path/to/mue[lab]'", "pip install muon"):
        assert not FROM_AN_INDEX.search(right), right
    assert len(commands(PAGE)) >= 6 and len(fences(PAGE, "python")) == 1
