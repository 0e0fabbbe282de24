"""The repository's pages as tests read them: fences, links, headings with their anchors, sentences."""

from __future__ import annotations

import doctest
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.paths import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(`+)[^`]+\1")


def pages() -> list[Path]:
    """README, CHANGELOG and everything in docs/."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(path: Path) -> str:
    """A page as it is cited: ``docs/findings/head.md``."""
    return path.relative_to(ROOT).as_posix()


def fences(text: str, language: str | None = None) -> list[tuple[str, str]]:
    """(language, code) of every fence, or of those in one language, top to bottom."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [(kind, code) for kind, code in found if language in (None, kind)]


def prose(text: str) -> str:
    """The page without its fences and comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.S | re.M)


def anchors(text: str) -> list[str]:
    """What a link to a heading says after the ``#``, as the forge makes it of the heading's words."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain]


def links(text: str) -> list[str]:
    """Targets of all links and pictures but those into the web."""
    return [link for link in LINK.findall(CODE.sub("", prose(text))) if not re.match(r"\w+:", link)]


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose, list items and table cells; headings and code are none."""
    plain = re.sub(r"\[((?:[^]\[]|\[[^]]*\])*)\]\([^)]*\)", r"\1", CODE.sub("code", prose(text)))
    plain = re.sub(r"^#.*$|^ {4}.*$", "", plain, flags=re.M)
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.) )|(?<=\|)\n|(?<!\\\\)\||\n(?=\|)", plain)
    found = [part for piece in pieces for part in re.split(r"(?<=[.!?])[*_)\"]*\s+", piece.strip())]
    return [" ".join(part.split()) for part in found if part.strip()]


def words(sentence: str) -> int:
    """How many words a reader counts: what has a letter or a digit in it."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def broken(files: Mapping[str, str], root: Path) -> list[str]:
    """Links of these pages (name → text) that lead to no file, no page of docs/ or no heading, as ``page: link``."""
    found = []
    for page, text in files.items():
        for link in links(text):
            path, _, anchor = link.partition("#")
            target = (root / page).parent / path if path else root / page
            there = target.is_file() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))
            if not there:
                found.append(f"{page}: {link}")
    return found


def run_python(text: str, page: str) -> dict[str, Any]:
    """Run a page's ``python`` and ``pycon`` fences, top to bottom, in one namespace; what a session prints is compared.

    Returns:
        The namespace.
    """
    names: dict[str, Any] = {"__name__": page}
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF, verbose=False)
    failed: list[str] = []
    for kind, code in fences(text):
        if kind == "python":
            exec(compile(code, page, "exec", dont_inherit=True), names)  # without this file's own __future__
        elif kind == "pycon":
            session = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
            session.globs = names
            runner.run(session, out=failed.append, clear_globs=False)
    assert not failed, "".join(failed)
    return names


def run_toml(text: str) -> list[str]:
    """Read a page's ``toml`` fences as the files they are.

    Returns:
        What each of them is: ``"plan"``, ``"sweep"``, or ``"table"`` for a part of a file, which only has to be TOML.
    """
    from mue.lab.sweep.spec import sweep_from
    from mue.plan.toml import plan_inputs
    from mue.plan.transfer import plan_of

    kinds = []
    for _, code in fences(text, "toml"):
        data = tomllib.loads(code)
        if {"base", "tuned", "target"} <= set(data):
            plan_of(plan_inputs(data))
            kinds.append("plan")
        elif {"base", "data", "sweep"} <= set(data):
            sweep_from(data, Path("."))
            kinds.append("sweep")
        else:
            kinds.append("table")
    return kinds


def commands(text: str) -> list[list[str]]:
    """The words of every line of a page's ``bash`` fences, comments left out."""
    lines = [line for _, code in fences(text, "bash") for line in code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def understood(words: list[str]) -> None:
    """Raise where a command line is not one: a target of the Makefile, a script that is there, options that mue has."""
    from typer.main import get_command

    from mue.cli import app

    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables before a command
        words = words[1:]
    program, name, *arguments = words
    if program == "make":
        assert f"\n{name}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), name
    elif program == "python" and not name.startswith("-"):
        assert (ROOT / name).is_file(), name
    elif program == "mue":
        known: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
        known[name].make_context(name, arguments).close()
    else:
        assert (program, name) in INSTALLS, words


INSTALLS = {("pip", "install"), ("uv", "add"), ("uv", "pip"), ("uv", "venv"), ("git", "clone"), ("python", "-m")}
"""What a page may ask of other programs; nothing of it is run."""
