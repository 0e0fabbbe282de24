"""Text in, batches of tokens out: corpora as memory-mapped streams, batches as a pure function of (seed, step).

    corpus  = load_corpus(Path("my_text/"), cache=Path("runs/cache"))     # or stdlib_corpus(cache): no download
    batches = Batches(corpus, "train", sequence=256, batch_sequences=32, seed=0)
    x_BT, y_BT = batches.at(1_000_000)                                     # any step, at once

A corpus is tokenised once into ``cache/<hash>.bin``; the JSON beside it is written last and is what makes it valid.
The cached file is itself a pre-tokenised source: ``load_corpus(cache / "<hash>.bin", ...)`` reads it.

Shape suffixes: B sequences in a batch, T tokens in a sequence, W = T + 1 tokens in a window, N windows in an epoch.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import secrets
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["TEXT_SUFFIXES", "Batches", "Corpus", "load_corpus", "stdlib_corpus"]

# Prose and source code. Data formats (.json, .csv, .xml) stay out: in a folder of code they are mostly fixtures.
TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go"}
    | {".java", ".js", ".ts", ".rb", ".sh", ".sql"}
)
EXCLUDED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
# What tokenizers of the field call the end of a document, most common first.
END_OF_TEXT = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
)

_FORMAT = "mue-corpus-1"  # part of every hash: change it when the same files would give other tokens
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".bin": "bin"}
_VALIDATION_NAMES = frozenset({"val", "valid", "validation"})
_CHUNK = 1 << 22

Tokens = npt.NDArray[Any]
Split = Literal["train", "validation"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams and where they come from.

    ``train`` and ``validation`` are read-only memory maps of shape (tokens,), uint8, uint16 or uint32. ``hash`` is the
    sha256 of contents, relative names, tokenizer and split: the same files give it on any machine, under any path.
    ``bytes`` counts the source files. ``skipped`` says what was left out, as reason -> count; it is never silent.
    """

    train: Tokens
    validation: Tokens
    vocab: int
    hash: str
    files: int
    bytes: int
    tokenizer: str
    """``"bytes"``, ``"sha256:<of the tokenizer file>"``, or what the sidecar of a ``.bin`` says."""
    separator: int | None
    """The token between two documents; None where a ``.bin`` does not say."""
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.train) + len(self.validation)

    def describe(self) -> dict[str, Any]:
        """What a result file records about its data: JSON-ready, no paths."""
        return {
            "hash": self.hash,
            "files": self.files,
            "bytes": self.bytes,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
            "vocab": self.vocab,
            "tokenizer": self.tokenizer,
            "skipped": dict(self.skipped),
        }


def load_corpus(
    source: Path | str | list[Path],
    *,
    tokenizer: Path | None = None,
    validation_fraction: float = 0.1,
    cache: Path,
    text_key: str = "text",
    separator: str | None = None,
    dtype: str | None = None,
    vocab: int | None = None,
    suffixes: frozenset[str] = TEXT_SUFFIXES,
    exclude: frozenset[str] = EXCLUDED_FOLDERS,
) -> Corpus:
    """Read local text (or tokens) into a :class:`Corpus`, tokenising it only if ``cache`` does not hold it yet.

    source: a text file, ``.jsonl`` (one object per line, the document under ``text_key``), ``.parquet`` (column
        ``text_key``), ``.bin`` (tokens), a folder of these (recursive), or a list of files and folders. A file that
        is named must be readable; inside a folder, what cannot be used is counted in ``Corpus.skipped``.
    tokenizer: a ``tokenizers`` JSON; without it a token is a byte and documents are separated by byte 0. With it they
        are separated by ``separator``, by default the tokenizer's end-of-text token.
    validation_fraction: of files, chosen by a hash of the relative name, so that adding a file moves no other. From
        a single file the tail is taken, cut between two documents where one ends close by. Files called ``train`` and
        ``val`` (nothing else among them) are taken at their word.
    dtype, vocab: for a ``.bin`` without its sidecar ``<name>.json`` = ``{"dtype", "vocab", "tokenizer"}`` (nanoGPT:
        ``"uint16"``, 50257). For text, ``vocab`` may only enlarge the tokenizer's (padding).
    suffixes, exclude: the text files taken, and folders skipped (by name or by relative path; so are hidden ones).

    Raises ValueError with one line naming the thing and the fix. Nothing half-written is left behind.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}")
    sources = [Path(source)] if isinstance(source, (Path, str)) else [Path(s) for s in source]
    found, skipped = _find(
        sources, suffixes, exclude | {str(Path(cache).resolve())}, tokens_described=dtype is not None
    )
    index = _Index(Path(cache), [*sources, *sorted(suffixes)])
    files = _examine_all(found, index, skipped)
    if not files:
        raise ValueError(_nothing_usable(sources, skipped, suffixes))

    if any(f.kind == "bin" for f in files):
        encoder = _token_encoder(files, tokenizer, dtype, vocab)
    else:
        encoder = _tokenizer_encoder(Path(tokenizer), separator) if tokenizer is not None else _byte_encoder()
        encoder = _padded(encoder, vocab, tokenizer)

    train, validation = _split(files, validation_fraction)
    recipe = {
        "format": _FORMAT,
        "tokenizer": [encoder.name, encoder.vocab, encoder.separator, encoder.dtype.name],
        "text_key": text_key if any(f.kind in ("jsonl", "parquet") for f in files) else None,
        "train": [[f.name, f.kind, f.digest] for f in train],
        "validation": [[f.name, f.kind, f.digest] for f in validation] or validation_fraction,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    stream, meta = _cached(Path(cache), key, encoder.dtype) or _build(
        Path(cache), key, train, validation, encoder, text_key, validation_fraction
    )
    index.save()
    cut = int(meta["train_tokens"])
    return Corpus(
        train=stream[:cut],
        validation=stream[cut:],
        vocab=encoder.vocab,
        hash=key,
        files=len(files),
        bytes=sum(f.size for f in files),
        tokenizer=encoder.name,
        separator=encoder.separator,
        skipped=dict(skipped + Counter(meta["skipped"])),
    )


def stdlib_corpus(cache: Path, *, validation_fraction: float = 0.1) -> Corpus:
    """The Python standard library's own source on this machine: real text, no download, about 12 MB, byte-level.

    Test suites are left out: Linux distributions strip them, so that with them the same Python would give another
    corpus from machine to machine. Split by file. Raises ValueError where Python came without its source.
    """
    exclude = EXCLUDED_FOLDERS | {"test", "tests", "idle_test"}
    source = Path(sysconfig.get_path("stdlib"))
    return load_corpus(
        source, cache=cache, validation_fraction=validation_fraction, suffixes=frozenset({".py"}), exclude=exclude
    )


# ---------------------------------------------------------------------------------------------------- finding files


@dataclass(frozen=True)
class _Found:
    name: str  # relative to the folder it was found in, "/" between parts; never depends on where the folder lies
    path: Path
    kind: str  # "text", "jsonl", "parquet" or "bin"
    named: bool  # the user named this very file, so a problem with it is an error


@dataclass(frozen=True)
class _File(_Found):
    size: int
    digest: str


def _find(
    sources: list[Path], suffixes: frozenset[str], exclude: frozenset[str], tokens_described: bool
) -> tuple[list[_Found], Counter[str]]:
    if not sources:
        raise ValueError("no source of text was given: name a file or a folder")
    found: list[_Found] = []
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
            found.append(_Found(path.name if len(sources) > 1 else kind, path, kind, named=True))
        else:
            raise ValueError(f"{path}: no such file or folder; check the path (it is relative to {Path.cwd()})")
    seen: Counter[str] = Counter()
    unique = []
    for f in found:  # two folders may hold the same relative name: number them in the order given
        seen[f.name] += 1
        unique.append(f if seen[f.name] == 1 else _Found(f"{f.name}#{seen[f.name]}", f.path, f.kind, f.named))
    return sorted(unique, key=lambda f: f.name), skipped


def _walk(
    root: Path, suffixes: frozenset[str], exclude: frozenset[str], tokens_described: bool, skipped: Counter[str]
) -> Iterator[_Found]:
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
            elif kind == "bin" and not tokens_described and _beside(path) is None:
                skipped[".bin without its sidecar"] += 1  # in a folder of code, most likely no tokens at all
            else:
                yield _Found((inside / name).as_posix(), path, kind, named=False)


def _kind(path: Path, suffixes: frozenset[str]) -> str | None:
    suffix = path.suffix.lower()
    return _KINDS.get(suffix) or ("text" if suffix in suffixes else None)


def _nothing_usable(sources: list[Path], skipped: Counter[str], suffixes: frozenset[str]) -> str:
    names = ", ".join(str(s) for s in sources)
    why = ", ".join(f"{n} x {reason}" for reason, n in sorted(skipped.items()) if n) or "it is empty"
    return f"{names}: no usable text ({why}); it needs files with one of {' '.join(sorted([*suffixes, *_KINDS]))}"


# ------------------------------------------------------------------------------------------------ examining, hashing


class _Index:
    """(size, mtime) -> (sha256, problem) of every file seen before, so that an unchanged corpus is not read again."""

    def __init__(self, cache: Path, scope: list[Any]) -> None:
        absolute = [str(s.resolve()) if isinstance(s, Path) else str(s) for s in scope]
        name = hashlib.sha256("\n".join([_FORMAT, *absolute]).encode()).hexdigest()[:16]
        self.path = cache / f"index-{name}.json"
        old = _read_json(self.path)
        self.old: dict[str, list[Any]] = old if isinstance(old, dict) else {}
        self.new: dict[str, list[Any]] = {}

    def look(self, found: _Found) -> tuple[int, str, str | None]:
        """Size, digest and problem of a file. Raises OSError if it cannot be read."""
        stat = found.path.stat()
        known = self.old.get(found.name)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, *_digest(found.path, found.kind)]
        # A file written just now can change again within the clock's grain: look at it once more next time.
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self.new[found.name] = known
        return known[0], known[2], known[3]

    def save(self) -> None:
        if self.new != self.old:
            _write_json(self.path, self.new)


def _examine_all(found: list[_Found], index: _Index, skipped: Counter[str]) -> list[_File]:
    files = []
    for f in found:
        try:
            size, digest, problem = index.look(f)
        except OSError as error:
            size, digest, problem = 0, "", f"unreadable ({error.strerror})"
        if problem is None:
            files.append(_File(f.name, f.path, f.kind, f.named, size, digest))
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
        while chunk := handle.read(_CHUNK):
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


def _split(files: list[_File], fraction: float) -> tuple[list[_File], list[_File]]:
    """Train and validation files. One file alone is all train here; its tail is cut off once it is tokenised."""
    if len(files) == 1:
        return files, []
    stems = {Path(f.name).stem for f in files}
    if "train" in stems and stems & _VALIDATION_NAMES and stems <= _VALIDATION_NAMES | {"train"}:
        chosen = {f.name for f in files if Path(f.name).stem != "train"}
    else:
        place = {f.name: int(hashlib.sha256(f.name.encode()).hexdigest()[:16], 16) / 2**64 for f in files}
        chosen = {name for name, p in place.items() if p < fraction}
        if not chosen:
            chosen = {min(place, key=place.__getitem__)}
        elif len(chosen) == len(files):
            chosen.remove(max(place, key=place.__getitem__))
    return [f for f in files if f.name not in chosen], [f for f in files if f.name in chosen]


# -------------------------------------------------------------------------------------------------------- tokenising


@dataclass(frozen=True)
class _Encoder:
    name: str
    vocab: int
    dtype: np.dtype[Any]
    separator: int | None
    encode: Callable[[list[str]], list[Tokens]]


def _smallest_dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if vocab <= 2**8 else np.uint16 if vocab <= 2**16 else np.uint32)


def _byte_encoder() -> _Encoder:
    def encode(texts: list[str]) -> list[Tokens]:
        return [np.frombuffer(t.encode(), dtype=np.uint8) for t in texts]

    return _Encoder("bytes", 256, np.dtype(np.uint8), 0, encode)


def _tokenizer_encoder(path: Path, separator: str | None) -> _Encoder:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs `tokenizers`: pip install tokenizers") from error
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file; name a tokenizer.json")
    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a `tokenizers` JSON ({reason}); save one with Tokenizer.save") from error
    names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    vocab = max(names.values()) + 1  # ids may have gaps, so a count would be too small
    end = separator if separator is not None else next((t for t in END_OF_TEXT if t in names), None)
    if end is None or end not in names:
        what = "no end-of-text token was recognised" if end is None else f"it has no token {end!r}"
        raise ValueError(f'{path}: {what}; name the token between documents: separator="<its text>"')

    def encode(texts: list[str]) -> list[Tokens]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.uint32) for e in encodings]

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _Encoder(f"sha256:{digest}", vocab, _smallest_dtype(vocab), names[end], encode)


def _padded(encoder: _Encoder, vocab: int | None, tokenizer: Path | None) -> _Encoder:
    if vocab is None or vocab == encoder.vocab:
        return encoder
    if vocab < encoder.vocab:
        whose = "bytes" if tokenizer is None else str(tokenizer)
        raise ValueError(f"vocab = {vocab} is smaller than the {encoder.vocab} of {whose}; leave it out or enlarge it")
    return _Encoder(encoder.name, vocab, _smallest_dtype(vocab), encoder.separator, encoder.encode)


def _token_encoder(files: list[_File], tokenizer: Path | None, dtype: str | None, vocab: int | None) -> _Encoder:
    """Not an encoder but the description of tokens that exist already: every file's sidecar, which have to agree."""
    text = next((f for f in files if f.kind != "bin"), None)
    if text is not None:
        raise ValueError(f"{text.path}: text among .bin files of tokens; load one kind or the other")
    sidecars = [_sidecar(f, dtype, vocab) for f in files]
    for f, other in zip(files[1:], sidecars[1:], strict=True):
        if other != sidecars[0]:
            raise ValueError(
                f"{f.path}: {other} differs from {files[0].path}: {sidecars[0]}; use one tokenizer for all"
            )
    kind, size, name, separator = sidecars[0]
    if tokenizer is not None:
        wanted = _tokenizer_encoder(Path(tokenizer), None)
        if wanted.vocab > size or (name.startswith("sha256:") and name != wanted.name):
            raise ValueError(
                f"{files[0].path}: tokenised with {name} (vocab {size}), not with {tokenizer} (vocab {wanted.vocab});"
                " pass the tokenizer it was made with"
            )

    def encode(texts: list[str]) -> list[Tokens]:
        raise AssertionError("tokens are not tokenised again")

    return _Encoder(name, size, np.dtype(kind), separator, encode)


def _beside(path: Path) -> Path | None:
    return next((p for p in (path.with_suffix(".json"), Path(f"{path}.json")) if p.is_file()), None)


def _sidecar(file: _File, dtype: str | None, vocab: int | None) -> tuple[str, int, str, int | None]:
    """dtype, vocab, tokenizer and separator of a .bin, from the JSON beside it or from the caller."""
    beside = _beside(file.path)
    said: dict[str, Any] = {}
    if beside is not None:
        read = _read_json(beside)
        if not isinstance(read, dict):
            raise ValueError(
                f'{beside}: not a JSON object; it needs {{"dtype": "uint16", "vocab": ..., "tokenizer": ...}}'
            )
        said = read
    for key, value in (("dtype", dtype), ("vocab", vocab)):
        if value is not None and said.setdefault(key, value) != value:
            raise ValueError(f"{beside}: says {key} = {said[key]!r}, the caller {value!r}; leave out one of the two")
    missing = [key for key in ("dtype", "vocab") if key not in said]
    if missing:
        raise ValueError(
            f"{file.path}: {' and '.join(missing)} of its tokens unknown; pass them, or write"
            f' {{"dtype": "uint16", "vocab": 50257}} to {beside or file.path.with_suffix(".json")}'
        )
    kind, size, separator = said["dtype"], said["vocab"], said.get("separator")
    if kind not in ("uint8", "uint16", "uint32"):
        raise ValueError(f"{file.path}: dtype {kind!r} of tokens is not supported; use uint16 or uint32")
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise ValueError(f"{file.path}: vocab must be a whole number of at least 2, not {size!r}")
    if file.size % np.dtype(kind).itemsize:
        raise ValueError(f"{file.path}: {file.size} bytes are no whole number of {kind} tokens; check the dtype")
    return kind, size, str(said.get("tokenizer", "unknown")), separator if isinstance(separator, int) else None


# ------------------------------------------------------------------------------------------------- reading documents

_Piece = tuple[bool, str]  # does a document start here, and its text or the next stretch of it


def _pieces(file: _File, text_key: str, skipped: Counter[str]) -> Iterator[_Piece]:
    if file.kind == "text":
        yield from _text_pieces(file.path)
        return
    documents = _jsonl_documents if file.kind == "jsonl" else _parquet_documents
    for where, document in documents(file.path, text_key, skipped):
        if not isinstance(document, str):
            raise ValueError(
                f"{where}: {text_key!r} is {type(document).__name__}, not text; name the text's key: text_key="
            )
        if "\0" in document or _has_surrogate(document):
            raise ValueError(f"{where}: binary text (a NUL or a lone surrogate); remove the document or clean it")
        if document:
            yield True, document
        else:
            skipped["empty document"] += 1


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _text_pieces(path: Path) -> Iterator[_Piece]:
    # A long text goes to the tokenizer in stretches of about a million characters, cut after a newline: one merge in
    # a million may be missed there, and memory stays flat.
    first = True
    with path.open(encoding="utf-8", newline="") as handle:
        while stretch := handle.read(1 << 20):
            yield first, stretch + handle.readline()
            first = False


def _jsonl_documents(path: Path, key: str, skipped: Counter[str]) -> Iterator[tuple[str, object]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                skipped["blank line"] += 1
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: bad JSON ({error}); one object per line, nothing else") from error
            if not isinstance(record, dict) or key not in record:
                has = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ValueError(f"{where}: no key {key!r} (it has {has}); name the text's key: text_key=")
            yield where, record[key]


def _parquet_documents(path: Path, key: str, skipped: Counter[str]) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    arrow: Any = pyarrow
    try:
        table = arrow.parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from error
    with table:
        if key not in table.schema_arrow.names:
            raise ValueError(f"{path}: no column {key!r} (it has {table.schema_arrow.names}); name it: text_key=")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[key]):
            for document in batch.column(0).to_pylist():
                yield f"{path}, row {row}", document
                row += 1


# -------------------------------------------------------------------------------------------------- writing the cache


def _build(
    cache: Path,
    key: str,
    train: list[_File],
    validation: list[_File],
    encoder: _Encoder,
    text_key: str,
    fraction: float,
) -> tuple[Tokens, dict[str, Any]]:
    """Tokenise into ``<key>.bin`` (train, then validation) and describe it in ``<key>.json``, which is written last."""
    skipped: Counter[str] = Counter()
    cut = 0

    def write(handle: BinaryIO) -> None:
        nonlocal cut
        _write_tokens(handle, train, encoder, text_key, skipped)
        cut = handle.tell() // encoder.dtype.itemsize
        _write_tokens(handle, validation, encoder, text_key, skipped)

    path = cache / f"{key}.bin"
    _atomic(path, write)
    tokens = path.stat().st_size // encoder.dtype.itemsize
    try:
        if tokens < 2:
            raise ValueError(f"{train[0].path}: no text to learn from ({tokens} tokens); name a longer text")
        if not validation:
            cut = _tail(np.memmap(path, encoder.dtype, "r"), fraction, encoder.separator)
        if cut in (0, tokens):
            raise ValueError(f"{train[0].path}: one half of the split is empty; name more text")
    except ValueError:
        path.unlink()
        raise
    meta = {
        "dtype": encoder.dtype.name,
        "vocab": encoder.vocab,
        "tokenizer": encoder.name,
        "separator": encoder.separator,
        "tokens": tokens,
        "train_tokens": cut,
        "skipped": dict(skipped),
    }
    _write_json(cache / f"{key}.json", meta)
    built = _cached(cache, key, encoder.dtype)
    assert built is not None, "the cache was written a moment ago"
    return built


def _cached(cache: Path, key: str, dtype: np.dtype[Any]) -> tuple[Tokens, dict[str, Any]] | None:
    meta = _read_json(cache / f"{key}.json")
    path = cache / f"{key}.bin"
    if not isinstance(meta, dict) or not path.is_file() or path.stat().st_size != meta["tokens"] * dtype.itemsize:
        return None
    return np.memmap(path, dtype, "r"), meta


def _write_tokens(
    handle: BinaryIO, files: list[_File], encoder: _Encoder, text_key: str, skipped: Counter[str]
) -> None:
    between = b"" if encoder.separator is None else np.array([encoder.separator], encoder.dtype).tobytes()
    beginning = True
    if files and files[0].kind == "bin":
        for file in files:
            handle.write(b"" if beginning else between)
            beginning = False
            for tokens in _token_chunks(file, encoder):
                handle.write(tokens.tobytes())
        return
    pieces = (piece for file in files for piece in _pieces(file, text_key, skipped))
    for group in _grouped(pieces):
        for (starts, _), tokens in zip(group, encoder.encode([text for _, text in group]), strict=True):
            handle.write(between if starts and not beginning else b"")
            beginning = False
            handle.write(tokens.astype(encoder.dtype).tobytes())


def _token_chunks(file: _File, encoder: _Encoder) -> Iterator[Tokens]:
    position = 0
    with file.path.open("rb") as handle:
        while raw := handle.read(_CHUNK):
            tokens = np.frombuffer(raw, encoder.dtype)
            if int(tokens.max()) >= encoder.vocab:
                at = int(np.argmax(tokens >= encoder.vocab))
                raise ValueError(
                    f"{file.path}: token {tokens[at]} at position {position + at} is outside the vocab of"
                    f" {encoder.vocab}; check vocab and dtype"
                )
            position += len(tokens)
            yield tokens


def _grouped(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in groups of a few million characters: enough to keep the tokenizer's threads busy."""
    group: list[_Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1])
        if characters >= _CHUNK:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _tail(stream: Tokens, fraction: float, separator: int | None) -> int:
    """Where the validation tail of a single file begins: after a separator near the fraction, else exactly there."""
    size = max(1, round(len(stream) * fraction))
    cut = max(1, len(stream) - size)
    if separator is None:
        return cut
    low, high = max(0, cut - size // 2), min(len(stream) - 1, cut + size // 2)
    ends = np.flatnonzero(stream[low:high] == separator) + low + 1
    return int(ends[np.argmin(np.abs(ends - cut))]) if len(ends) else cut


def _atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that is there whole or not at all, even if the machine stops in between."""
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with name.open("xb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        if new and not any(path.parent.iterdir()):
            path.parent.rmdir()
        raise


def _write_json(path: Path, value: object) -> None:
    def write(handle: BinaryIO) -> None:
        handle.write(json.dumps(value).encode())

    _atomic(path, write)


def _read_json(path: Path) -> Any:
    """The value in a JSON file, or None where there is no such file or no JSON in it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


# ----------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one split, in an order that is a pure function of (seed, step): nothing is remembered between calls.

    An epoch shifts the stream by a random offset, cuts it into N non-overlapping windows of T + 1 tokens and visits
    each once, in an order drawn for that epoch. The order comes from a keyed bijection on 0..N-1 (:func:`_shuffled`),
    not from a stored permutation, so any step of any epoch costs the same. Windows cross document boundaries.

    Raises ValueError if the split is shorter than one window, or if a size is not positive.
    """

    corpus: Corpus
    split: Split
    sequence: int
    batch_sequences: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation"):
            raise ValueError(f"split = {self.split!r} does not exist; it is 'train' or 'validation'")
        for name in ("sequence", "batch_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self._stream) < self._window:
            raise ValueError(
                f"the {self.split} text has {len(self._stream)} tokens, shorter than one sequence of {self.sequence}"
                " + 1; use more text or a shorter sequence"
            )

    @property
    def _stream(self) -> Tokens:
        return self.corpus.train if self.split == "train" else self.corpus.validation

    @property
    def _window(self) -> int:
        return self.sequence + 1  # one token more: the targets are the inputs moved by one

    @property
    def windows(self) -> int:
        """N: windows in an epoch, the same whatever the epoch's offset."""
        return max(1, (len(self._stream) - self.sequence) // self._window)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_sequences * self.sequence

    def epochs(self, steps: int) -> float:
        """How often ``steps`` steps go through the split."""
        return steps * self.batch_sequences / self.windows

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs x_BT and targets y_BT (int64, CPU) of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"steps count from 0, so there is no step {step}")
        sample_B = np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences, dtype=np.int64)
        epoch_B, place_B = np.divmod(sample_B, self.windows)
        start_B = np.empty_like(sample_B)
        for epoch in np.unique(epoch_B):  # two where a batch straddles epochs, more only for a tiny text
            here = epoch_B == epoch
            order = _round_keys("order", self.seed, int(epoch))
            slack = len(self._stream) - self.windows * self._window
            offset = int(_round_keys("offset", self.seed, int(epoch))[0]) % (slack + 1)
            start_B[here] = offset + self._window * _shuffled(place_B[here], self.windows, order)
        return self._gather(start_B)

    def fixed(self, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """At most ``n`` batches spread evenly over the whole split, for evaluation: no seed, the same every time.

        Each batch spans the split, so that a prefix of the list is a fair sample too. There are fewer than ``n`` where
        the split holds fewer without overlap; there is always one.
        """
        if n < 1:
            raise ValueError(f"the number of batches must be at least 1, not {n}")
        n = min(n, max(1, len(self._stream) // (self._window * self.batch_sequences)))
        last = len(self._stream) - self._window
        start_S = np.linspace(0, last, n * self.batch_sequences).astype(np.int64)
        return [self._gather(start_S[i::n]) for i in range(n)]

    def _gather(self, start_B: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        window_BW = self._stream[start_B[:, None] + np.arange(self._window)].astype(np.int64)
        tokens_BW = torch.from_numpy(window_BW)
        return tokens_BW[:, :-1].contiguous(), tokens_BW[:, 1:].contiguous()


_ROUNDS = 8


def _round_keys(purpose: str, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Eight 64-bit keys from (purpose, seed, epoch): a hash, so the same with every numpy on every machine."""
    digest = hashlib.blake2b(f"{purpose} {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _shuffled(place: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a permutation of 0..n-1, drawn by ``keys``, sends each place: O(1) per place, no table.

    A Feistel network on the grid (left, right) of about sqrt(n) x sqrt(n): each round adds to one half a keyed hash
    of the other, which is invertible, so the whole is a bijection of the grid. The grid is a little larger than n;
    walking on from the places outside until one falls inside keeps a bijection (Black & Rogaway 2002, "cycle walking").
    """
    columns = max(1, int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)

    def network(index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = np.divmod(index, np.uint64(columns))
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _mix(right, key) % np.uint64(rows)) % np.uint64(rows)
            else:
                right = (right + _mix(left, key) % np.uint64(columns)) % np.uint64(columns)
        return left * np.uint64(columns) + right

    out = network(place.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014) of value and key; wraps modulo 2^64 on purpose."""
    z = value * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
