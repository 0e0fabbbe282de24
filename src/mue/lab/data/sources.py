"""Which files a corpus is made of: found, examined, hashed, split."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
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
CHUNK = 1 << 22  # bytes or characters handled at once: memory stays flat, and Python's share of the time small
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".bin": "bin"}
_VALIDATION_NAMES = frozenset({"val", "valid", "validation"})


@dataclass(frozen=True)
class FoundFile:
    """A file that may be part of a corpus.

    Attributes:
        name: relative to the folder it was found in, "/" between parts: it never depends on where the folder lies.
        kind: "text", "jsonl", "parquet" or "bin".
        named: the user named this very file, so a problem with it is an error.
    """

    name: str
    path: Path
    kind: str
    named: bool


@dataclass(frozen=True)
class SourceFile(FoundFile):
    """A file that is part of a corpus, with its bytes and the sha256 of its content."""

    size: int
    digest: str


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
                known = " ".join(sorted([*suffixes, *_KINDS]))
                raise ValueError(f"{path}: the suffix {path.suffix!r} is unknown; rename it to one of {known}")
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

    def unreadable(error: OSError) -> None:
        skipped["unreadable folder"] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        inside = Path(folder).relative_to(root)
        keep = []
        for name in folders:
            paths = {name, (inside / name).as_posix(), str(Path(folder, name).resolve())}
            out = name.startswith(".") or bool(paths & exclude)
            skipped["excluded folder"] += out
            if not out:
                keep.append(name)
        folders[:] = sorted(keep)
        for name in names:
            path = Path(folder, name)
            kind = _kind(path, suffixes)
            if kind is None:
                # The sidecar of a .bin is no text of its own, and no loss.
                skipped["other suffix"] += not (path.suffix == ".json" and path.with_suffix(".bin").exists())
            elif kind == "bin" and not tokens_described and beside(path) is None:
                skipped[".bin without its sidecar"] += 1  # in a folder of code, most likely no tokens at all
            else:
                yield FoundFile((inside / name).as_posix(), path, kind, named=False)


def _kind(path: Path, suffixes: frozenset[str]) -> str | None:
    suffix = path.suffix.lower()
    return _KINDS.get(suffix) or ("text" if suffix in suffixes else None)


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
        name = hashlib.sha256("\n".join([FORMAT, *absolute]).encode()).hexdigest()[:16]
        self.path = cache / f"index-{name}.json"
        old = read_json(self.path)
        self.old: dict[str, list[Any]] = old if isinstance(old, dict) else {}
        self.new: dict[str, list[Any]] = {}

    def look(self, found: FoundFile) -> tuple[int, str, str | None]:
        """Size, digest and problem of a file. Raises OSError if it cannot be read."""
        stat = found.path.stat()
        known = self.old.get(found.name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, *_digest(found.path, found.kind)]
        # A file written just now can change again within the clock's grain (two seconds on FAT, the coarsest): look at
        # it once more next time.
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self.new[found.name] = known
        return known[0], known[2], known[3]

    def save(self) -> None:
        """Write what was looked at, where it differs from what is stored."""
        if self.new != self.old:
            write_compact_json(self.path, self.new)


def examine_all(found: list[FoundFile], index: Index, skipped: Counter[str]) -> list[SourceFile]:
    """The files that can be read as what they are; others are counted in ``skipped``, or an error where the user named them."""
    files = []
    for f in found:
        try:
            size, digest, problem = index.look(f)
        except OSError as error:
            size, digest, problem = 0, "", f"unreadable ({error.strerror})"
        if problem is None:
            files.append(SourceFile(f.name, f.path, f.kind, f.named, size, digest))
        elif f.named:
            fix = {"empty": "name a file with text in it", "binary": "name a text file, or tokens as .bin"}
            raise ValueError(f"{f.path}: the file is {problem}; {fix.get(problem, 'convert it to UTF-8 text')}")
        else:
            skipped[problem] += 1
    return files


def _digest(path: Path, kind: str) -> tuple[str, str | None]:
    """sha256 of a file, and what keeps it from being text: empty, binary (NUL bytes) or not UTF-8."""
    sha = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")() if kind in ("text", "jsonl") else None
    problem: str | None = "empty"
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            sha.update(chunk)
            if problem == "empty":
                problem = None
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
