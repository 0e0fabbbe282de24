"""Every fence of the pages in docs/ is run or read; what a session prints is what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.pages import commands, fences, name, pages, run_python, run_toml, understood

# (tests/test_readme.py, test_architecture.py and test_start.py have those of README, of developers and of the first pages)
ELSEWHERE = ("README.md", "CHANGELOG.md", "docs/architecture.md", "docs/start/")
TEXTS = {name(path): path.read_text(encoding="utf-8") for path in pages() if not name(path).startswith(ELSEWHERE)}
KINDS = {"bash", "pycon", "python", "text", "toml"}


def having(*kinds: str) -> list[str]:
    return [page for page, text in TEXTS.items() if any(kind in kinds for kind, _ in fences(text))]


def test_every_fence_is_of_a_kind_that_is_tested_here() -> None:
    """None is lost to the way they are found; without a language there is what no one types."""
    for page, text in TEXTS.items():
        found = fences(text)
        assert {kind for kind, _ in found} <= KINDS | {""}, page
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in text.splitlines()), page
    assert len(having(*KINDS)) >= 10


@pytest.mark.parametrize("page", having("python", "pycon"))
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "".join(code for _, code in fences(TEXTS[page], "python"))
    extras = {"transformers": ("transformers", "hf"), "TrainingArguments": ("accelerate", "hf")}
    for word, (package, extra) in {**extras, "from diffusers": ("diffusers", "diffusers")}.items():
        if word in code:
            pytest.importorskip(package, reason=f"this page needs the {extra} extra")
    monkeypatch.chdir(tmp_path)
    run_python(TEXTS[page], page)


@pytest.mark.parametrize("page", having("toml"))
def test_tables_are_read(page: str) -> None:
    assert run_toml(TEXTS[page])


@pytest.mark.parametrize("page", having("bash"))
def test_commands_are_understood(page: str) -> None:
    for words in commands(TEXTS[page]):
        understood(words)


def test_control_what_is_wrong_is_found() -> None:
    with pytest.raises(AssertionError, match="ndiff"):
        run_python("```pycon\n>>> 1 + 1\n3\n```\n", "a page")
    with pytest.raises(ZeroDivisionError):
        run_python("```python\nx = 1 / 0\n```\n", "a page")
    assert run_python("```python\nx = 1\n```\n```pycon\n>>> x\n1\n>>> y = x\n```\n", "a page")["y"] == 1
    for wrong in ("make nothing", "python benchmarks/none.py", "brew install mue"):
        with pytest.raises(AssertionError):
            understood(wrong.split())
