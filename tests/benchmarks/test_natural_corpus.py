"""The natural corpus from made-up packages: which paragraphs it takes, that it is whole or absent, and that sums decide."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import natural_corpus
from mue.lab.data import load_corpus
from mue.lab.study.spec import study_from
from mue.lab.sweep.spec import sweep_from
from natural_corpus import Package, is_prose, main, paragraphs

STUDIES = Path(natural_corpus.__file__).parent / "studies"
SENTENCE = "This is a sentence of the manual, number {}, which is long enough to be taken for prose."
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def said(number: int) -> str:
    return SENTENCE.format(WORDS[number])


def deb(files: Mapping[str, str]) -> bytes:
    """A Debian package of these files: an ``ar`` archive with a member of odd size before the tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content.encode())
            tar.addfile(entry, io.BytesIO(content.encode()))
    archive = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("data.tar.xz", out.getvalue())):
        archive += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return archive


PAGES = {
    "usr/share/doc/a/html/index.html": f"<h1>Title</h1><p>{said(0)}</p><pre>code = {said(1)}</pre><p>See</p>",
    "usr/share/doc/a/html/deep/page.html": f"<p class='x'>{said(2)[:20]}<b>{said(2)[20:40]}</b>\n {said(2)[40:]}</p>",
    "usr/share/doc/a/html/empty.html": "<p>Short.</p>",
    "usr/share/doc/a/html/other/page.html": f"<p>{said(3)}</p>",
    "usr/share/doc/a/html/notes.txt": f"<p>{said(4)}</p>",
    "usr/share/doc/elsewhere/page.html": f"<p>{said(5)}</p>",
}
TEXT = {"a/deep/page.txt": said(2), "a/index.txt": said(0)}


def sum_of(text: Mapping[str, str]) -> str:
    lines = [
        f"{hashlib.sha256((body + chr(10)).encode()).hexdigest()}  {name}\n" for name, body in sorted(text.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package whose archive lies in ``tmp_path / "archives"``."""
    data = deb(PAGES)
    made = Package("a", "1-2", hashlib.sha256(data).hexdigest(), "MIT", "usr/share/doc/a/html", without=("other",))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / made.archive).write_bytes(data)
    return made


def make(folder: Path, *packages: Package, expected: str = sum_of(TEXT)) -> int:
    return main([str(folder / "out"), "--archives", str(folder / "archives")], packages, expected)


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, download: str) -> None:
    """Puts an ``apt-get`` first in the path that runs a shell line for ``download`` and fails at ``update``."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "apt-get"
    script.write_text(f'#!/bin/sh\ncase "$*" in *update*) exit 100;; esac\n{download}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of the messages, which is the only one about what went wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("natural_corpus: ")]
    assert len(lines) == 1
    return lines[0]


def untouched(folder: Path) -> bool:
    """Whether nothing was written where the corpus goes."""
    return not [path for path in folder.iterdir() if path.name not in ("archives", "bin")]


def test_the_text_is_the_paragraphs_of_the_pages(tmp_path: Path, package: Package) -> None:
    assert make(tmp_path, package) == 0
    root = tmp_path / "out" / "text"
    written = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.txt")}
    assert written == {name: body + "\n" for name, body in TEXT.items()}


def test_the_manifest_says_what_the_text_was_made_of(tmp_path: Path, package: Package) -> None:
    make(tmp_path, package)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sha256"] == sum_of(TEXT)
    assert manifest["bytes"] == sum(len(body) + 1 for body in TEXT.values())
    assert manifest["packages"][0].items() >= {"name": "a", "version": "1-2", "licence": "MIT"}.items()
    for file in manifest["files"]:
        assert file["sha256"] == hashlib.sha256((tmp_path / "out" / "text" / file["name"]).read_bytes()).hexdigest()


def test_a_paragraph_is_there_once_in_all_packages(tmp_path: Path, package: Package) -> None:
    data = deb({"p/a.html": f"<p>{said(0)}</p><p>{said(6)}</p><p>{said(6)}</p><p>{said(7)}</p>"})
    other = Package("b", "1", hashlib.sha256(data).hexdigest(), "MIT", "p")
    (tmp_path / "archives" / other.archive).write_bytes(data)
    both = {**TEXT, "b/a.txt": f"{said(6)}\n\n{said(7)}"}
    assert make(tmp_path, package, other, expected=sum_of(both)) == 0


@pytest.mark.parametrize(
    ("paragraph", "prose"),
    [
        (said(0), True),
        (f"({said(0)})", True),
        (said(0).removesuffix("."), False),  # a heading or a cell
        ("Too short to tell.", False),
        ("0x00 0x01 0x02 0x03 0x04 0x05 0x06 0x07 0x08 0x09 0x0a 0x0b 0x0c 0x0d.", False),
        ("", False),
    ],
)
def test_prose_is_long_ended_and_made_of_words(paragraph: str, prose: bool) -> None:
    assert is_prose(paragraph) == prose


def test_tags_and_entities_are_no_text() -> None:
    assert list(paragraphs(f"<p\nid='1'>&quot;{said(0)}<br/>&amp; <a href='x'>more</a>.</p>")) == [f'"{said(0)}& more.']


def test_a_second_run_changes_nothing(tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, package)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "archives" / package.archive).unlink()
    assert make(tmp_path, package) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("change", ["edit", "add", "remove", "manifest"])
def test_a_changed_corpus_is_refused(
    change: str, tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, package)
    page = tmp_path / "out" / "text" / "a" / "index.txt"
    if change == "edit":
        page.write_text("other")
    elif change == "add":
        page.with_name("new.txt").write_text("other")
    elif change == "remove":
        page.unlink()
    else:
        (tmp_path / "out" / "manifest.json").unlink()
    assert make(tmp_path, package) == 2
    assert "delete the folder or name another" in one_line(capsys)


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert make(tmp_path, package) == 2
    assert "not the corpus" in one_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_archive_with_another_sum_is_refused(
    tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, replace(package, sha256="0" * 64)) == 2
    assert "delete it" in one_line(capsys)
    assert untouched(tmp_path)


def test_a_text_with_another_sum_is_refused(
    tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, package, expected="0" * 64) == 2
    assert "the extraction differs" in one_line(capsys)
    assert untouched(tmp_path)


def test_a_missing_archive_is_downloaded_and_kept(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "archives" / package.archive
    kept.rename(tmp_path / "archives" / "elsewhere")
    fake_apt(tmp_path, monkeypatch, f'case "$*" in *"download a=1-2") cp ../elsewhere {package.archive};; esac')
    assert make(tmp_path, package) == 0
    assert sorted(path.name for path in kept.parent.iterdir()) == [package.archive, "elsewhere"]


@pytest.mark.parametrize(
    ("download", "why"),
    [
        ("echo \"E: Version '1-2' for 'a' was not found\" >&2; exit 100", "Version '1-2' for 'a' was not found: put"),
        ("exit 0", "apt-get download failed"),
        ("echo other > a_1-2_all.deb", "with another sha256"),
    ],
)
def test_what_cannot_be_downloaded_leaves_nothing(
    download: str,
    why: str,
    tmp_path: Path,
    package: Package,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "archives" / package.archive).unlink()
    fake_apt(tmp_path, monkeypatch, download)
    assert make(tmp_path, package) == 2
    assert why in one_line(capsys)
    assert untouched(tmp_path)
    assert not list((tmp_path / "archives").iterdir())


def test_without_apt_get_the_archives_are_asked_for_by_name(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "archives" / package.archive).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make(tmp_path, package) == 2
    assert f"put {package.archive} of Debian 12 into {tmp_path / 'archives'}" in one_line(capsys)


def test_the_lab_reads_a_page_as_a_document(tmp_path: Path, package: Package) -> None:
    make(tmp_path, package)
    corpus = load_corpus(tmp_path / "out" / "text", cache=tmp_path / "cache", validation_fraction=0.5)
    assert corpus.files == 2
    assert not corpus.skipped
    assert len(corpus.validation) > 0


def test_the_study_differs_from_the_house_s_in_the_data_alone() -> None:
    house = Path(natural_corpus.__file__).parents[1] / "src" / "mue" / "lab" / "study" / "house.toml"
    ours, theirs = (
        study_from(tomllib.loads(path.read_text()), path.parent) for path in (STUDIES / "natural.toml", house)
    )
    for name in ("base", "training", "tuned", "settings"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.source != theirs.source
    # each target is one of the house's, with the same cells at the same names
    assert {(t.axis, t.name) for t in ours.targets} <= {(t.axis, t.name) for t in theirs.targets}


def test_the_base_sweep_is_of_the_study_s_base() -> None:
    study = study_from(tomllib.loads((STUDIES / "natural.toml").read_text()), STUDIES)
    sweep = sweep_from(tomllib.loads((STUDIES / "natural_base.toml").read_text()), STUDIES)
    assert (sweep.base, sweep.training, sweep.settings) == (study.base, study.training, study.settings)
    assert sweep.source == study.source
    assert sweep.defaults.betas == study.tuned.betas
    assert min(sweep.grid.lr) < study.tuned.lr < max(sweep.grid.lr)
