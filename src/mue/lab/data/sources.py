"""Which files a corpus is made of: found, examined, hashed, split."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mue.util.files import write_text

# Prose and source code. Data formats (.json, .csv, .xml) stay out: in a folder of code they are mostly fixtures.
TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go"}
    | {".java", ".js", ".ts", ".rb", ".sh", ".sql"}
)
EXCLUDED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
FORMAT = "mue-corpus-1"  # part of every hash: change it when the same files would give other tokens
_DIGEST = "2"  # part of an index's name: change it when _digest says something else of the same file
CHUNK = 1 << 22  # bytes or characters handled at once: memory stays flat, and Python's share of the time small
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".bin": "bin", ".npy": "npy"}
TOKENS = ("bin", "npy")  # of these kinds, those that hold tokens
_UNPACK = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip", ".tar": "tar -xf"}
# How files begin that are no text, whatever they are called; longest first, for UTF-32's mark begins with UTF-16's.
FOREIGN = {
    b"BZh91AY&SY": "packed (bzip2)",
    b"\xfd7zXZ\0": "packed (xz)",
    b"\x28\xb5\x2f\xfd": "packed (zstd)",
    b"PK\x03\x04": "packed (zip)",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    b"\x1f\x8b\x08": "packed (gzip)",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_VALIDATION_NAMES = frozenset({"val", "valid", "validation"})


@dataclass(frozen=True)
class FoundFile:
    """A file that may be part of a corpus.

    Attributes:
        name: relative to the folder it was found in, "/" between parts: it never depends on where the folder lies.
        kind: "text", "jsonl", "parquet", "bin" or "npy".
        named: the user named this very file, so a problem with it is an error.
    """

    name: str
    path: Path
    kind: str
    named: bool


@dataclass(frozen=True)
class SourceFile(FoundFile):
    """A file that is part of a corpus, with its bytes and the sha256 of its content as they were when it was examined.

    Attributes:
        mtime: nanoseconds; with the size what tells whether it has changed since.
    """

    size: int
    digest: str
    mtime: int

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was hashed: its tokens would be kept under the hash of another text."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime):
            raise ValueError(
                f"{self.path}: the file changed while it was read; load it again once nothing writes to it"
            )


def find(
    sources: list[Path], suffixes: frozenset[str], exclude: frozenset[str], tokens_described: bool
) -> tuple[list[FoundFile], Counter[str]]:
    """The files that sources name or hold, by name, and how many others were passed over, by reason.

    Args:
        suffixes: of text. exclude: folders, by name or path. tokens_described: the caller says what a ``.bin`` holds, so it needs no sidecar.

    Raises:
        ValueError: no sources, a missing one, or a named file of an unknown suffix.
    """
    if not sources:
        raise ValueError("no source of text was given: name a file or a folder")
    found: list[FoundFile] = []
    skipped: Counter[str] = Counter()
    for path in sources:
        if path.is_dir():
            found += _walk(path, suffixes, exclude, tokens_described, skipped)
        elif path.is_file():
            kind = _kind(path, suffixes)
            if kind is None:
                raise ValueError(f"{path}: {_unknown_suffix(path, suffixes)}")
            # The hash of a lone file is that of its content, whatever it is called.
            found.append(FoundFile(path.name if len(sources) > 1 else kind, path, kind, named=True))
        else:
            raise ValueError(f"{path}: no such file or folder; check the path (it is relative to {Path.cwd()})")
    seen: Counter[str] = Counter()
    unique = []
    for f in found:  # two folders may hold the same relative name: number them in the order given
        seen[f.name] += 1
        unique.append(f if seen[f.name] == 1 else FoundFile(f"{f.name}#{seen[f.name]}", f.path, f.kind, f.named))
    return sorted(unique, key=lambda f: f.name), skipped


def _walk(
    root: Path, suffixes: frozenset[str], exclude: frozenset[str], tokens_described: bool, skipped: Counter[str]
) -> Iterator[FoundFile]:
    """The files of a folder that may be text; what is left out is counted by its reason."""
    for folder, inside, names in walk_folders(root, exclude, lambda reason, _: skipped.update([reason])):
        for name in names:
            path = folder / name
            kind = _kind(path, suffixes)
            if kind is None:
                # The sidecar of a .bin is no text of its own, and no loss.
                sidecar = path.suffix == ".json" and any(path.with_suffix(end).exists() for end in (".bin", ".npy"))
                skipped["packed file" if path.suffix.lower() in _UNPACK else "other suffix"] += not sidecar
            elif kind in TOKENS and not tokens_described and beside(path) is None:
                skipped[f"{path.suffix.lower()} without its sidecar"] += 1  # most likely no tokens at all
            else:
                yield FoundFile((inside / name).as_posix(), path, kind, named=False)


def walk_folders(
    root: Path, exclude: frozenset[str], skip: Callable[[str, str], object]
) -> Iterator[tuple[Path, Path, list[str]]]:
    """Each folder below ``root`` once, as (where it is, its name relative to ``root``, the names of its files).

    What is passed over is told to ``skip``: the reason, and the folder's name. Those that lie in the tree come first and those that it links to last, in one order on every machine: however links lead back,
    none is read twice, and a name does not depend on them.
    """

    def unreadable(error: OSError) -> None:
        skip("unreadable folder", Path(error.filename).name)

    def is_new(folder: Path) -> bool:
        real = folder.resolve()
        known = real in seen
        seen.add(real)
        if known:
            skip("folder linked again", folder.name)
        return not known

    seen: set[Path] = set()
    tops = [(root, Path())]
    while tops:
        top, name = tops.pop(0)
        if not is_new(top):
            continue
        for folder, folders, names in os.walk(top, onerror=unreadable):
            inside = name / Path(folder).relative_to(top)
            keep = []
            for below in sorted(folders):
                path = Path(folder, below)
                if below.startswith(".") or {below, (inside / below).as_posix(), str(path.resolve())} & exclude:
                    skip("excluded folder", (inside / below).as_posix())
                elif path.is_symlink():
                    tops.append((path, inside / below))
                elif is_new(path):
                    keep.append(below)
            folders[:] = keep
            yield Path(folder), inside, names


def _kind(path: Path, suffixes: frozenset[str]) -> str | None:
    suffix = path.suffix.lower()
    return _KINDS.get(suffix) or ("text" if suffix in suffixes else None)


def _unknown_suffix(path: Path, suffixes: frozenset[str]) -> str:
    if unpack := _UNPACK.get(path.suffix.lower()):
        return f"the file is packed; unpack it first: {unpack} {path.name}"
    known = " ".join(sorted([*suffixes, *_KINDS]))
    return f"the suffix {path.suffix!r} is unknown; convert it to one of {known}, or rename it where it is one already"


def nothing_usable(sources: list[Path], skipped: Counter[str], suffixes: frozenset[str]) -> str:
    """What to say where a corpus would be empty: what was passed over and why."""
    names = ", ".join(str(s) for s in sources)
    why = ", ".join(f"{n} x {reason}" for reason, n in sorted(skipped.items()) if n) or "it is empty"
    return f"{names}: no usable text ({why}); it needs files with one of {' '.join(sorted([*suffixes, *_KINDS]))}"


class Index:
    """(size, mtime) -> (sha256, problem) of every file seen before, so that an unchanged corpus is not read again.

    Args:
        cache: the folder it is kept in. scope: what was asked for; each has an index of its own, or they would drop
            each other's files.
    """

    def __init__(self, cache: Path, scope: list[Any]) -> None:
        absolute = [str(s.resolve()) if isinstance(s, Path) else str(s) for s in scope]
        name = hashlib.sha256("\n".join([FORMAT, _DIGEST, *absolute]).encode()).hexdigest()[:16]
        self.path = cache / f"index-{name}.json"
        old = read_json(self.path)
        self.old: dict[str, list[Any]] = old if isinstance(old, dict) else {}
        self.new: dict[str, list[Any]] = {}

    def look(self, found: FoundFile) -> tuple[int, int, str, str | None]:
        """Size, time of the last change, digest and problem of a file. Raises OSError if it cannot be read."""
        stat = found.path.stat()
        known = self.old.get(found.name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, *_digest(found.path, found.kind)]
        # A file written just now can change again within the clock's grain (two seconds on FAT, the coarsest): look at
        # it once more next time.
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self.new[found.name] = known
        return known[0], known[1], known[2], known[3]

    def save(self) -> None:
        """Write what was looked at, where it differs from what is stored."""
        if self.new != self.old:
            write_compact_json(self.path, self.new)


def examine_all(found: list[FoundFile], index: Index, skipped: Counter[str]) -> list[SourceFile]:
    """The files that can be read as what they are; others are counted in ``skipped``, or an error where the user named them."""
    files = []
    for f in found:
        try:
            size, mtime, digest, problem = index.look(f)
        except OSError as error:
            size, mtime, digest, problem = 0, 0, "", f"unreadable ({error.strerror})"
        if problem is None:
            files.append(SourceFile(f.name, f.path, f.kind, f.named, size, digest, mtime))
        elif f.named:
            fix = {"empty": "name a file with text in it", "binary": "name a text file, or tokens as .bin"}
            fix |= {name: "unpack it first" for name in FOREIGN.values() if name.startswith("packed")}
            raise ValueError(f"{f.path}: the file is {problem}; {fix.get(problem, 'convert it to UTF-8 text')}")
        else:
            skipped[problem] += 1
    return files


def foreign(head: bytes) -> str | None:
    """What a file is that begins so, where that is no text."""
    return next((name for magic, name in FOREIGN.items() if head.startswith(magic)), None)


def _digest(path: Path, kind: str) -> tuple[str, str | None]:
    """sha256 of a file, and what keeps it from being text: empty, packed, in another encoding, binary (NUL bytes), not UTF-8.

    The byte order mark that some editors put before UTF-8 is no text: with it or without, a file is the same.
    """
    sha = hashlib.sha256()
    text = kind in ("text", "jsonl")
    decoder = codecs.getincrementaldecoder("utf-8")() if text else None
    problem: str | None = "empty"
    with path.open("rb") as handle:
        head = handle.read(16)
        handle.seek(len(codecs.BOM_UTF8) if text and head.startswith(codecs.BOM_UTF8) else 0)
        while chunk := handle.read(CHUNK):
            sha.update(chunk)
            if problem == "empty":
                problem = foreign(head) if text else None
            if decoder is None or problem is not None:
                continue
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                problem = "not UTF-8"
            if b"\0" in chunk:
                problem = "binary"
    if decoder is not None and problem is None:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            problem = "not UTF-8"
    return sha.hexdigest(), problem


def split(files: list[SourceFile], fraction: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """Train and validation files. One file alone is all train here; its tail is cut off once it is tokenised.

    Args:
        fraction: of files that validate. Both sides have at least one, however few there are.
    """
    if len(files) == 1:
        return files, []
    stems = {Path(f.name).stem for f in files}
    if "train" in stems and stems & _VALIDATION_NAMES and stems <= _VALIDATION_NAMES | {"train"}:
        chosen = {f.name for f in files if Path(f.name).stem != "train"}
    else:
        # A hash of the name alone: adding a file moves no other from one side to the other.
        place = {f.name: int(hashlib.sha256(f.name.encode()).hexdigest()[:16], 16) / 2**64 for f in files}
        chosen = {name for name, p in place.items() if p < fraction}
        if not chosen:
            chosen = {min(place, key=place.__getitem__)}
        elif len(chosen) == len(files):
            chosen.remove(max(place, key=place.__getitem__))
    return [f for f in files if f.name not in chosen], [f for f in files if f.name in chosen]


def beside(path: Path) -> Path | None:
    """The sidecar of a .bin, if there is one."""
    return next((p for p in (path.with_suffix(".json"), Path(f"{path}.json")) if p.is_file()), None)


def write_compact_json(path: Path, value: object) -> None:
    """Compact JSON, written atomically."""
    write_text(path, json.dumps(value))


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None where there is no such file or no JSON in it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
