"""Pages: every link leads somewhere, here and on the site, and every page has its place there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import mue
from support.pages import anchors, broken, fences, links, name, pages
from support.paths import ROOT

TEXTS = {name(path): path.read_text(encoding="utf-8") for path in pages()}
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def of_docs(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{file}", ROOT / "docs" / f"{file}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def placed(nav: Any) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in placed(part)]


def test_every_link_leads_to_a_file_and_a_heading(tmp_path: Path) -> None:
    assert broken(TEXTS, ROOT) == []
    assert sum(len(links(text)) for text in TEXTS.values()) > 70
    there = {
        "docs/a.md": "# One `x`, two\n[b](b.md#b-c) [a](#one-x-two) ![p](p.png) [w](https://x.y)",
        "docs/b.md": "## B c",
    }
    (tmp_path / "docs").mkdir()
    for page, text in there.items():
        (tmp_path / page).write_text(text)
    (tmp_path / "docs" / "p.png").touch()
    assert broken(there, tmp_path) == []
    wrong = {"docs/a.md": "[no](c.md) [`no`](b.md#c) [no](#two) [no](../docs) `[code](d.md)`"}
    assert broken(wrong, tmp_path) == [f"docs/a.md: {link}" for link in ("c.md", "b.md#c", "#two", "../docs")]


def test_links_stay_in_what_the_site_has() -> None:
    """Sources have no place there, so that pages name them in code and link none."""
    outside = set(of_docs("hooks").OUTSIDE)
    for page, text in TEXTS.items():
        for link in links(text):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve().relative_to(ROOT).as_posix()
            assert target.startswith("docs/") or target in outside or link.startswith("#"), (page, link)


def test_every_page_has_its_place_in_the_navigation() -> None:
    here = of_docs("hooks")
    given = {page.removeprefix("docs/") for page in TEXTS if page.startswith("docs/")}
    made = {*here.OUTSIDE.values(), *here.REFERENCE.values()}
    assert sorted(placed(SITE["nav"])) == sorted(given | made)
    assert placed(SITE["nav"])[0] == "index.md"


def test_links_are_turned_for_the_site() -> None:
    turned = of_docs("hooks").for_site
    assert turned("[a](docs/rules.md#b) ![p](docs/images/p.png)", "README.md") == "[a](rules.md#b) ![p](images/p.png)"
    assert turned("[a](../README.md) [l](LOG.md) [w](https://x.y) [h](#h)", "docs/architecture.md") == (
        "[a](index.md) [l](LOG.md) [w](https://x.y) [h](#h)"
    )
    assert (
        turned("[c](../../CHANGELOG.md) [l](../LOG.md)", "docs/findings/a.md") == "[c](../changelog.md) [l](../LOG.md)"
    )


def test_the_notebook_is_a_page() -> None:
    """Words as they are, code and what it prints in fences, pictures as files of the site."""
    hooks = of_docs("hooks")
    data = json.loads((ROOT / hooks.NOTEBOOK).read_text(encoding="utf-8"))
    text, pictures = hooks.notebook(data, "tutorial")
    kinds = [kind for kind, _ in fences(text)]
    code = sum(cell["cell_type"] == "code" for cell in data["cells"])
    assert kinds.count("python") == code and kinds.count("") >= 4 and text.startswith("# ")
    assert list(pictures) == ["tutorial-1.png"] and "(tutorial-1.png)" in text
    assert pictures["tutorial-1.png"].startswith(b"\x89PNG")


def test_the_reference_has_every_public_name() -> None:
    text = of_docs("hooks").reference("mue")
    for public in mue.__all__:
        assert f"heading: {public}, " in text or not callable(getattr(mue, public)), public
    assert "::: mue.plan.transfer.transfer\n" in text and "::: mue.api.Plan\n" in text


def test_docstrings_are_made_readable() -> None:
    pytest.importorskip("griffe", reason="the site needs the docs extra")
    ours = "Makes :class:`X`.\n\n>>> f(1)\n2\n\nArgs:\n    lr, eps: of Adam. n: 3"
    assert of_docs("docstrings").readable(ours) == (
        "Makes `X`.\n\n```pycon\n>>> f(1)\n2\n```\n\nArgs:\n    lr: see `eps`.\n    eps: of Adam. n: 3"
    )


def test_cited_pages_and_headings_are_there() -> None:
    """Comments and messages cite ``docs/page.md#heading``."""
    cited: dict[str, set[str]] = {}
    for path in sorted(p for folder in ("src", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")):
        if path != Path(__file__):
            for page, anchor in re.findall(r"\b(docs/[\w./-]+\.md)(#[\w-]+)?", path.read_text(encoding="utf-8")):
                cited.setdefault(page + anchor, set()).add(path.name)
    for where, by in cited.items():
        page, _, anchor = where.partition("#")
        assert page in TEXTS and (not anchor or anchor in anchors(TEXTS[page])), (where, by)
    assert len(cited) > 5
