"""A corpus: two token streams, tokenised once into a memory-mapped cache."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from mue.lab.data.documents import Piece, pieces, text_key_hint
from mue.lab.data.encode import Encoder, Tokens, byte_encoder, padded, tokenizer_encoder
from mue.lab.data.sources import (
    CHUNK,
    EXCLUDED_FOLDERS,
    FORMAT,
    TEXT_SUFFIXES,
    TOKENS,
    Index,
    SourceFile,
    examine_all,
    find,
    nothing_usable,
    read_json,
    split,
    write_compact_json,
)
from mue.lab.data.stored_tokens import token_chunks, token_encoder
from mue.util.errors import positive
from mue.util.files import write_atomic


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams and where they come from.

    ``train`` and ``validation`` are read-only memory maps of shape (tokens,), uint8, uint16 or uint32. ``hash`` is the
    sha256 of contents, relative names, tokenizer and split: the same files give it on any machine, under any path.
    ``bytes`` counts the source files. ``skipped`` says what was left out, as reason -> count; it is never silent.
    """

    kind: ClassVar[str] = "text"

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

    def summary(self) -> str:
        """A line for people, with how much was left out."""
        skipped = ", ".join(f"{n} {why}" for why, n in self.skipped.items())
        return (
            f"{self.files} files, {self.bytes / 1e6:.1f} MB, {self.tokens:,} tokens, vocabulary {self.vocab}, sha256 {self.hash[:16]}"
            + (f" (left out: {skipped})" if skipped else "")
        )


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

    Args:
        source: a text file, ``.jsonl`` (one object per line, the document under ``text_key``), ``.parquet`` (column
            ``text_key``), ``.bin`` or ``.npy`` (tokens), a folder of these (recursive, links followed, each folder once), or a
            list of files and folders. A file that is named must be readable; inside a folder, what cannot be used is counted in
            ``Corpus.skipped``, and so is what documents lack: those without text, characters without a token.
        tokenizer: a ``tokenizers`` JSON; without it a token is a byte and documents are separated by byte 0. With it they
            are separated by ``separator``, by default the tokenizer's end-of-text token.
        cache: a folder for tokens and indices; several processes may share it.
        validation_fraction: of files, chosen by a hash of the relative name, so that adding a file moves no other. From
            a single file the tail is taken, cut between two documents where one ends close by. Files called ``train`` and
            ``val`` (nothing else among them) are taken at their word.
        dtype, vocab: for a ``.bin`` without its sidecar ``<name>.json`` = ``{"dtype", "vocab", "tokenizer"}`` (nanoGPT:
            ``"uint16"``, 50257; also ``"int32"``, ``"int64"``, and ``">u2"`` for bytes in the other order). For text, ``vocab`` may only enlarge the tokenizer's (padding).
        suffixes, exclude: the text files taken, and folders skipped (by name or by relative path; so are hidden ones).

    Raises:
        ValueError: with one line naming the thing and the fix. Nothing half-written is left behind.
    """
    validation_fraction = positive("validation_fraction", validation_fraction, below=1)
    files, index, skipped = _examined(source, Path(cache), suffixes, exclude, dtype)
    if any(f.kind in TOKENS for f in files):
        encoder = token_encoder(files, tokenizer, dtype, vocab)
    else:
        encoder = tokenizer_encoder(Path(tokenizer), separator) if tokenizer is not None else byte_encoder()
        encoder = padded(encoder, vocab, tokenizer)

    train, validation = split(files, validation_fraction)
    # Whatever decides the tokens, and nothing else: no path, no time.
    recipe = {
        "format": FORMAT,
        "tokenizer": [
            *(encoder.name, encoder.vocab, encoder.separator, encoder.dtype.name),
            *([encoder.stored.str] if encoder.stored else []),
        ],
        "text_key": text_key if any(f.kind in ("jsonl", "parquet") for f in files) else None,
        "train": [[f.name, f.kind, f.digest] for f in train],
        "validation": [[f.name, f.kind, f.digest] for f in validation] or validation_fraction,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    stream, meta = _cached(Path(cache), key, encoder.dtype) or _tokenise(
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


def _examined(
    source: Path | str | list[Path], cache: Path, suffixes: frozenset[str], exclude: frozenset[str], dtype: str | None
) -> tuple[list[SourceFile], Index, Counter[str]]:
    """The usable files of a source, at least one, what was remembered of them, and how many others were left out, by reason."""
    sources = [Path(source)] if isinstance(source, (Path, str)) else [Path(s) for s in source]
    # The cache may lie inside a source, and is no text of it.
    found, skipped = find(sources, suffixes, exclude | {str(cache.resolve())}, tokens_described=dtype is not None)
    index = Index(cache, [*sources, *sorted(suffixes)])
    files = examine_all(found, index, skipped)
    if not files:
        raise ValueError(nothing_usable(sources, skipped, suffixes))
    return files, index, skipped


def by_folder(
    source: Path | str | list[Path],
    *,
    cache: Path,
    held_out: bool,
    validation_fraction: float = 0.1,
    suffixes: frozenset[str] = TEXT_SUFFIXES,
    exclude: frozenset[str] = EXCLUDED_FOLDERS,
    dtype: str | None = None,
) -> dict[str, list[Path]]:
    """The files of a corpus by the first folder inside the source that they lie in; ``"."`` for those that lie in the source itself.

    Args:
        held_out: only those that :func:`load_corpus` validates on. Of a source of one file, which validates on its own tail, there are none.
        source, cache, validation_fraction, suffixes, exclude, dtype: as there.

    Returns:
        The paths by the folder's name, without empty ones.

    Raises:
        ValueError: as :func:`load_corpus`, of files and of the fraction.
    """
    validation_fraction = positive("validation_fraction", validation_fraction, below=1)
    files, index, _ = _examined(source, Path(cache), suffixes, exclude, dtype)
    index.save()
    out: dict[str, list[Path]] = {}
    for file in split(files, validation_fraction)[1] if held_out else files:
        folder, *inside = Path(file.name).parts
        out.setdefault(folder if inside else ".", []).append(file.path)
    return out


def stdlib_corpus(cache: Path, *, validation_fraction: float = 0.1) -> Corpus:
    """The Python standard library's own source on this machine: real text, no download, about 12 MB, byte-level.

    Test suites are left out: Linux distributions strip them, so that with them the same Python would give another
    corpus from machine to machine. Split by file.

    Args:
        cache: a folder for its tokens. validation_fraction: of files.

    Raises:
        ValueError: Python came without its source.
    """
    return load_corpus(**stdlib_source(), cache=cache, validation_fraction=validation_fraction)


def stdlib_source() -> dict[str, Any]:
    """The arguments of :func:`load_corpus` that name the text of :func:`stdlib_corpus`."""
    return {
        "source": Path(sysconfig.get_path("stdlib")),
        "suffixes": frozenset({".py"}),
        "exclude": EXCLUDED_FOLDERS | {"test", "tests", "idle_test"},
    }


def _tokenise(
    cache: Path,
    key: str,
    train: list[SourceFile],
    validation: list[SourceFile],
    encoder: Encoder,
    text_key: str,
    fraction: float,
) -> tuple[Tokens, dict[str, Any]]:
    """Tokenise into ``<key>.bin`` (train, then validation) and describe it in ``<key>.json``, which is written last."""
    skipped: Counter[str] = Counter()
    cut = 0

    def write(temporary: Path) -> None:
        nonlocal cut
        with temporary.open("wb") as handle:
            _write_tokens(handle, train, encoder, text_key, skipped)
            cut = handle.tell() // encoder.dtype.itemsize
            _write_tokens(handle, validation, encoder, text_key, skipped)
        for file in (*train, *validation):
            file.check_unchanged()

    path = cache / f"{key}.bin"
    write_atomic(path, write)
    tokens = path.stat().st_size // encoder.dtype.itemsize
    try:  # only now it is known how much there is
        if tokens < 2:
            why = "".join(f", {n} x {reason}" for reason, n in sorted(skipped.items()) if n)
            raise ValueError(
                f"{train[0].path}: no text to learn from ({tokens} tokens{why}); name a longer text{text_key_hint(skipped, text_key)}"
            )
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
    write_compact_json(cache / f"{key}.json", meta)
    built = _cached(cache, key, encoder.dtype)
    assert built is not None, "the cache was written a moment ago"
    return built


def _cached(cache: Path, key: str, dtype: np.dtype[Any]) -> tuple[Tokens, dict[str, Any]] | None:
    """The tokens and their description where ``cache`` holds both whole.

    The description is written last, so where it is and the size fits, nothing was interrupted.
    """
    meta = read_json(cache / f"{key}.json")
    path = cache / f"{key}.bin"
    if not isinstance(meta, dict) or not path.is_file() or path.stat().st_size != meta["tokens"] * dtype.itemsize:
        return None
    return np.memmap(path, dtype, "r"), meta


def _write_tokens(
    handle: BinaryIO, files: list[SourceFile], encoder: Encoder, text_key: str, skipped: Counter[str]
) -> None:
    """Append the tokens of files; the separator stands between documents, not before the first nor after the last."""
    between = b"" if encoder.separator is None else np.array([encoder.separator], encoder.dtype).tobytes()
    beginning = True
    if files and files[0].kind in TOKENS:
        for file in files:
            handle.write(b"" if beginning else between)
            beginning = False
            for tokens in token_chunks(file, encoder):
                handle.write(tokens.tobytes())
        return
    stretches = (piece for file in files for piece in pieces(file, text_key, skipped))
    for group in _grouped(stretches):
        texts = [text for _, text in group]
        if lost := encoder.unknown(texts):
            skipped["character that the tokenizer does not know"] += lost
        for (starts, _), tokens in zip(group, encoder.encode(texts), strict=True):
            handle.write(between if starts and not beginning else b"")
            beginning = False
            handle.write(tokens.astype(encoder.dtype).tobytes())


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of a few million characters: enough to keep the tokenizer's threads busy."""
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1])
        if characters >= CHUNK:
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
    # Near: so that the tail is between half and one and a half times what was asked for.
    low, high = max(0, cut - size // 2), min(len(stream) - 1, cut + size // 2)
    ends = np.flatnonzero(stream[low:high] == separator) + low + 1
    return int(ends[np.argmin(np.abs(ends - cut))]) if len(ends) else cut
