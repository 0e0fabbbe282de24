"""What is written: sentences that are read once, numbers that stand where they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.pages import name, pages, prose, sentences, words
from support.paths import ROOT

MOST_WORDS = 30
RECORDS = {"CHANGELOG.md", "docs/LOG.md"}  # of their day, and not rewritten
# Pages of before this limit, and how many longer sentences they may still have, all of them together. Shorten some, and lower
# the number; a page that has none left goes off the list.
OLD = (
    "docs/architecture.md",
    "docs/checks.md",
    "docs/evidence.md",
    "docs/exports.md",
    "docs/findings/betas.md",
    "docs/findings/depth.md",
    "docs/findings/gates.md",
    "docs/findings/head.md",
    "docs/findings/horizon.md",
    "docs/findings/per-role.md",
    "docs/findings/plain.md",
    "docs/findings/public-runs.md",
    "docs/findings/transfer.md",
    "docs/performance.md",
    "docs/routers.md",
    "docs/rules.md",
    "docs/studies.md",
    "docs/sweeps.md",
    "docs/trained.md",
)
STILL_LONGER = 137
TEXTS = {name(path): path.read_text(encoding="utf-8") for path in pages()}
QUOTING = ("docs/base.md", "docs/trust.md", "docs/why/index.md")
"""Pages that repeat numbers of others, each in the words of a link to where it stands."""


def long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if words(sentence) > MOST_WORDS]


def strangers(page: str, text: str, root: Path) -> list[str]:
    """Numbers in the words of a link that do not stand on the page it leads to."""
    found = []
    for said, target in re.findall(r"\[([^]]+)\]\(([^)#\s]+\.md)[^)]*\)", prose(text)):
        there = ((root / page).parent / target).read_text(encoding="utf-8")
        found += [number for number in re.findall(r"\d+\.\d+", said) if number not in there]
    return found


@pytest.mark.parametrize("page", sorted(set(TEXTS) - RECORDS))
def test_sentences_are_short(page: str) -> None:
    found = long(TEXTS[page])
    assert not found or page in OLD, "\n".join(found)
    assert found or page not in OLD, f"{page} has no longer sentence left: take it off the list"


def test_the_longer_ones_become_fewer() -> None:
    count = {page: len(long(TEXTS[page])) for page in OLD}
    assert sum(count.values()) <= STILL_LONGER, count


def test_control_sentences_are_told_apart() -> None:
    many = "word " * MOST_WORDS
    assert long(f"{many}.\n\n# {many} heading\n\n    {many} code in lines\n\n```\n{many} fence\n```") == []
    assert long(f"{many} more.") == long(f"One. {many}\nmore. Two.") == [f"{many}more."]
    assert len(long(f"- {many} a\n- {many} b\n\n| {many} c | {many} |\n|---|---|\n| few | {many} d |\n")) == 4
    assert long(f"[{many}](x.md). [{many}](y.md).") == [] != long(f"[{many}](x.md) more.")


@pytest.mark.parametrize("page", QUOTING)
def test_numbers_stand_where_they_link_to(page: str, tmp_path: Path) -> None:
    assert strangers(page, TEXTS[page], ROOT) == []
    assert len(re.findall(r"\[[^]]*\d\.\d[^]]*\]\(", TEXTS[page])) >= 2
    (tmp_path / "a.md").write_text("It was 0.25 and no more.")
    text = "[0.25 less](a.md), [0.24](a.md#x) and 0.7"
    assert strangers("b.md", text, tmp_path) == ["0.24"]  # negative control
