"""The study's second corpus, natural language: the paragraphs of three manuals as Debian 12 packages them, 27 MB.

    python benchmarks/natural_corpus.py runs/natural          # then, in a study or sweep: source = ".../runs/natural/text"
        [--archives FOLDER]    where the packages are kept, and looked for first (default: in the user's cache folder)

The packages come by ``apt-get download``, without root and with lists of its own, and their sums are checked. Where there is no apt-get or
its sources lack them, put the three archives into FOLDER, from any mirror or archive of Debian's: an archive is known by its sum.

The rule, of each HTML page: its ``<p>`` elements without their tags, white space made single, one paragraph a line and an empty line
between two; of these the ones that read as prose (see :func:`is_prose`), each where it comes first in the corpus only, so that no held-out
paragraph was trained on. Code, tables, headings and tables of contents are no such paragraphs. A page is a file, so that a held-out file is of the same kind.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mue.util.files import cache_folder, write_json


@dataclass(frozen=True)
class Package:
    """A Debian package of one HTML page a topic.

    Attributes:
        sha256: of its archive. licence: of the text, as the package's own copyright file has it. pages: the folder of its pages.
        without: folders of ``pages`` that are left out.
    """

    name: str
    version: str
    sha256: str
    licence: str
    pages: str
    without: tuple[str, ...] = ()

    @property
    def archive(self) -> str:
        return f"{self.name}_{self.version}_all.deb"


PACKAGES = (
    Package(
        "linux-doc-6.1",
        "6.1.176-1",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        "GPL-2.0",
        "usr/share/doc/linux-doc-6.1/html",
        without=("translations",),  # into other languages than English
    ),
    Package(
        "postgresql-doc-15",
        "15.18-0+deb12u1",
        "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0",
        "PostgreSQL",
        "usr/share/doc/postgresql-doc-15/html",
    ),
    Package(
        "python3.11-doc",
        "3.11.2-6+deb12u8",
        "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        "PSF-2.0",
        "usr/share/doc/python3.11/html",
    ),
)
# Of the whole text: the sum of the lines "SHA256  NAME" of its files, by name, as `sha256sum` prints them.
TEXT_SHA256 = "70435ad0fb7fcf1baa02888a2c2759e79d3038ddc493dac524f4de16c049c95f"

SHORTEST = 60  # characters of a paragraph: shorter ones are mostly labels
LETTERS = 0.9  # of its characters, at least so many are letters, spaces, commas, full stops or apostrophes
_PARAGRAPH = re.compile(r"<p(?:\s[^>]*)?>(.*?)</p>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is one or more sentences: long enough, ended like one, and mostly words."""
    words = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    return len(paragraph) >= SHORTEST and paragraph[-1] in '.?!:;)"”' and words >= LETTERS * len(paragraph)


def paragraphs(page: str) -> Iterator[str]:
    """The paragraphs of an HTML page that read as prose, in its order."""
    for inner in _PARAGRAPH.findall(page):
        text = " ".join(html.unescape(_TAG.sub("", inner)).split())
        if is_prose(text):
            yield text


def members(archive: bytes) -> tarfile.TarFile:
    """The files that a Debian package installs: the tar called ``data.tar.*`` in an ``ar`` archive (deb(5), ar(5))."""
    position = len(b"!<arch>\n")
    while position < len(archive):
        header = archive[position : position + 60]
        name, size, position = header[:16].decode().strip(" /"), int(header[48:58]), position + 60
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(archive[position : position + size]))
        position += size + size % 2
    raise ValueError("the archive has no data.tar")


def pages(package: Package, archive: bytes) -> Iterator[tuple[str, list[str]]]:
    """Name and paragraphs of a package's pages, by name."""
    found: dict[str, list[str]] = {}
    with members(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not (member.isfile() and path.suffix == ".html" and path.is_relative_to(package.pages)):
                continue
            inside = path.relative_to(package.pages)
            file = tar.extractfile(member)
            if inside.parts[0] not in package.without and file is not None:
                found[f"{package.name}/{inside.with_suffix('.txt')}"] = list(paragraphs(file.read().decode()))
    yield from sorted(found.items())


def texts(archives: Sequence[tuple[Package, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the corpus's files."""
    seen: set[str] = set()
    for package, archive in archives:
        for name, found in pages(package, archive):
            new = [text for text in dict.fromkeys(found) if text not in seen]
            seen.update(new)
            if new:
                yield name, ("\n\n".join(new) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def overall(files: Sequence[dict[str, Any]]) -> str:
    """The sum of the lines that `sha256sum` prints of files, by name."""
    return sha256("".join(f"{file['sha256']}  {file['name']}\n" for file in files).encode())


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """Put packages' archives into a folder by ``apt-get download``, each if its sum is right.

    Raises:
        ValueError: apt-get is missing, does not find a package or gets another; nothing of that is left.
    """
    by_hand = f"put {{}} of Debian 12 into {folder}, from any mirror or archive, and run this again"
    if shutil.which("apt-get") is None:
        raise ValueError("there is no apt-get here: " + by_hand.format(", ".join(p.archive for p in packages)))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".apt.") as name:
        own = Path(name)
        own.chmod(0o755)  # started by root, apt-get loads as another user
        (own / "lists" / "partial").mkdir(parents=True)
        (own / "cache" / "archives" / "partial").mkdir(parents=True)
        # Lists of its own: root's may be missing or old, and only root renews them.
        apt = ["apt-get", "-q", "-o", f"Dir::State::lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "LC_ALL": "C"}
            return subprocess.run([*apt, *command], cwd=own, env=environment, capture_output=True, text=True)

        print("asking apt-get for " + ", ".join(p.archive for p in packages), file=sys.stderr)
        run("update")  # where one of the sources fails, the others may have the packages: what is missing shows below
        for package in packages:
            done = run("download", f"{package.name}={package.version}")
            got = own / package.archive
            if done.returncode or not got.is_file():
                said = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")]
                raise ValueError(f"{(said or ['apt-get download failed'])[0]}: {by_hand.format(package.archive)}")
            if sha256(got.read_bytes()) != package.sha256:
                raise ValueError(f"apt-get gave {package.archive} with another sha256: {by_hand.format('the one')}")
            os.replace(got, folder / package.archive)


def archives_of(packages: Sequence[Package], folder: Path) -> list[tuple[Package, bytes]]:
    """The packages' archives, fetched where the folder lacks them.

    Raises:
        ValueError: one cannot be had, or has another sum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [package for package in packages if not (folder / package.archive).exists()]:
        fetch(missing, folder)
    out = []
    for package in packages:
        path = folder / package.archive
        data = path.read_bytes()
        if sha256(data) != package.sha256:
            raise ValueError(f"{path}: its sha256 is not {package.sha256}; delete it and run this again")
        out.append((package, data))
    return out


def manifest_of(packages: Sequence[Package], files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "corpus": "natural",
        "sha256": overall(files),
        "bytes": sum(file["bytes"] for file in files),
        "packages": [{**asdict(package), "archive": package.archive} for package in packages],
        "files": files,
    }


def write(packages: Sequence[Package], expected: str, archives: Path, out: Path) -> dict[str, Any]:
    """Write the corpus as a folder that is there whole or not at all.

    Raises:
        ValueError: an archive cannot be had, or its text is not the expected one.
    """
    found = archives_of(packages, archives)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        whole = Path(name) / "whole"
        files = []
        for file, content in texts(found):
            path = whole / "text" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            files.append({"name": file, "bytes": len(content), "sha256": sha256(content)})
        files.sort(key=lambda file: file["name"])
        manifest = manifest_of(packages, files)
        if manifest["sha256"] != expected:
            raise ValueError(f"the text's sum is {manifest['sha256']}, not {expected}: the extraction differs here")
        write_json(whole / "manifest.json", manifest)
        os.replace(whole, out)
    return manifest


def check(out: Path, expected: str) -> dict[str, Any]:
    """The manifest of a corpus written before.

    Raises:
        ValueError: the folder holds something else, or its text was changed.
    """
    again = f"{out}: {{}}; delete the folder or name another"
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    except (OSError, ValueError):
        raise ValueError(again.format("this folder is not the corpus")) from None
    names = sorted(path.relative_to(out / "text").as_posix() for path in (out / "text").rglob("*") if path.is_file())
    files = [{"name": name, "sha256": sha256((out / "text" / name).read_bytes())} for name in names]
    if overall(files) != expected:
        raise ValueError(again.format("its text is not the corpus as it is made now"))
    return manifest


def main(
    arguments: Sequence[str] | None = None, packages: Sequence[Package] = PACKAGES, expected: str = TEXT_SHA256
) -> int:
    """Make the corpus, or see that it is there; 0, or 2 after one line that says why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to be made: text/ and manifest.json")
    parser.add_argument("--archives", type=Path, default=cache_folder() / "archives", help="folder of the packages")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    try:
        there = out.exists() and (not out.is_dir() or any(out.iterdir()))
        manifest = check(out, expected) if there else write(packages, expected, options.archives.absolute(), out)
    except (ValueError, OSError) as error:
        print(f"natural_corpus: {error}", file=sys.stderr)
        return 2
    print(
        f"{out / 'text'}: {'already there, ' if there else ''}{len(manifest['files']):,} files, "
        f"{manifest['bytes'] / 1e6:.1f} MB, sha256 {manifest['sha256']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
