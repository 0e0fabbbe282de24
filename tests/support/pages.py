"""The repository's pages as tests read them: fences, links, headings with their anchors, sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

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
