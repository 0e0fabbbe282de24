"""Documents out of text, JSONL and Parquet files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mue.lab.data.sources import SourceFile

Piece = tuple[bool, str]
"""Whether a document starts here, and its text or the next stretch of it."""
NULL = "null document"


def pieces(file: SourceFile, text_key: str, skipped: Counter[str]) -> Iterator[Piece]:
    """The documents of a file, in order; a long one comes in stretches, so that memory stays flat.

    Args:
        text_key: where a JSONL object or a Parquet row has its text. skipped: counts what is left out, by its reason.

    Raises:
        ValueError: a line or row that is no text; the message names it and the fix.
    """
    if file.kind == "text":
        yield from _text_pieces(file.path)
        return
    documents = _jsonl_documents if file.kind == "jsonl" else _parquet_documents
    found = False  # text under the key: whoever reads on then has no reason to doubt the key
    for where, document in documents(file.path, text_key, skipped):
        if document is None or document != document:  # null, or the NaN that pandas writes for it
            skipped[NULL] += 1
            continue
        if not isinstance(document, str):
            fix = "mend that document, or leave it out" if found else "name the text's key: text_key="
            raise ValueError(f"{where}: {text_key!r} is {type(document).__name__}, not text; {fix}")
        found = True
        # A NUL would be read as the separator of byte tokens; a lone surrogate has no UTF-8.
        if "\0" in document or _has_surrogate(document):
            raise ValueError(f"{where}: binary text (a NUL or a lone surrogate); remove the document or clean it")
        if document:
            yield True, document
        else:
            skipped["empty document"] += 1


def text_key_hint(skipped: Mapping[str, int], text_key: str) -> str:
    """What to add to a message where documents were null under ``text_key``, and nothing else was found."""
    return f", or its key: text_key= ({text_key!r} is null)" if skipped.get(NULL) else ""


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A text file is one document."""
    # A long text goes to the tokenizer in stretches of about a million characters, cut after a newline: one merge in
    # a million may be missed there, and memory stays flat.
    first = True
    with path.open(encoding="utf-8-sig", newline="") as handle:  # a byte order mark is no text
        while stretch := handle.read(1 << 20):  # characters
            yield first, stretch + handle.readline()
            first = False


def _jsonl_documents(path: Path, key: str, skipped: Counter[str]) -> Iterator[tuple[str, object]]:
    """Where each document stands, for errors, and what is there under ``key``."""
    seen = 0  # the line that last had the key
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
                fix = f"line {seen} had it: mend this one" if seen else "name the text's key: text_key="
                raise ValueError(f"{where}: no key {key!r} (it has {has}); {fix}")
            seen = number
            yield where, record[key]


def _parquet_documents(path: Path, key: str, skipped: Counter[str]) -> Iterator[tuple[str, object]]:
    """As :func:`_jsonl_documents`, of the rows of a table; read in batches, so that memory stays flat."""
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
