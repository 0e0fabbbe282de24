"""Tokens that exist already: what lies in a ``.bin`` or ``.npy``, and whether it can be what its description says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mue.lab.data.encode import Encoder, Tokens, smallest_dtype, tokenizer_encoder
from mue.lab.data.sources import TOKENS, SourceFile, beside, foreign, read_json

CHUNK = 1 << 21  # tokens handled at once
_NUMPY = b"\x93NUMPY"
# The first of 256 int32 before the tokens in the files of llm.c and of what descends from it, by the tokens' width
# (its dev/data/data_common.py, HEADERS_INFO).
_LLMC = {(20240520).to_bytes(4, "little"): "uint16", (20240801).to_bytes(4, "little"): "uint32"}
_DTYPE = re.compile(r"u?int(8|16|32|64)|[<>][iu][1248]")
_FEW = 64  # words: in fewer tokens than that zeros at every second place are no evidence


def token_encoder(files: list[SourceFile], tokenizer: Path | None, dtype: str | None, vocab: int | None) -> Encoder:
    """Not an encoder but the description of tokens that exist already: every file's sidecar, which have to agree.

    Args:
        files: of tokens, all of them. tokenizer: the one they are said to come from.
        dtype, vocab: what the caller says of them.

    Raises:
        ValueError: text among them, a description that is missing, contradicted by another or by the tokens themselves.
    """
    text = next((f for f in files if f.kind not in TOKENS), None)
    if text is not None:
        raise ValueError(f"{text.path}: text among files of tokens; load one kind or the other")
    sidecars = [_sidecar(f, dtype, vocab) for f in files]
    for f, other in zip(files[1:], sidecars[1:], strict=True):
        if other != sidecars[0]:
            raise ValueError(
                f"{f.path}: {other} differs from {files[0].path}: {sidecars[0]}; use one tokenizer for all"
            )
    kind, size, name, separator = sidecars[0]
    if tokenizer is not None:
        wanted = tokenizer_encoder(Path(tokenizer), None)
        if wanted.vocab > size or (name.startswith("sha256:") and name != wanted.name):
            raise ValueError(
                f"{files[0].path}: tokenised with {name} (vocab {size}), not with {tokenizer} (vocab {wanted.vocab});"
                " pass the tokenizer it was made with"
            )
    for f in files:
        _check_width(f, np.dtype(kind), size)

    def encode(texts: list[str]) -> list[Tokens]:
        raise AssertionError("tokens are not tokenised again")

    lie = np.dtype(kind)
    as_kept = lie.kind == "u" and lie.isnative and lie.itemsize <= 4
    kept, stored = (lie, None) if as_kept else (smallest_dtype(size), lie)
    return Encoder(name, size, kept, separator, encode, stored=stored)


def token_chunks(file: SourceFile, encoder: Encoder) -> Iterator[Tokens]:
    """The tokens of a file, piece by piece, as the encoder keeps them; ``ValueError`` for one outside its vocabulary."""
    stream = _stream(file, encoder.stored or encoder.dtype)
    for position in range(0, len(stream), CHUNK):
        tokens = stream[position : position + CHUNK]
        wrong = (tokens >= encoder.vocab) | (tokens < 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            swapped = tokens.byteswap()
            hint = "check vocab and dtype"
            if bool(((swapped < encoder.vocab) & (swapped >= 0)).all()):
                other = tokens.dtype.newbyteorder("S").str
                hint = f"its bytes lie in the other order: say dtype = {other!r}"
            raise ValueError(
                f"{file.path}: token {tokens[at]} at position {position + at} is outside the vocab of"
                f" {encoder.vocab}; {hint}"
            )
        yield tokens.astype(encoder.dtype)


def _stream(file: SourceFile, dtype: np.dtype[Any]) -> Tokens:
    """All tokens of a file in one row, mapped into memory and not read."""
    return _array(file.path).reshape(-1) if file.kind == "npy" else np.memmap(file.path, dtype, "r")


def _array(path: Path) -> Tokens:
    try:
        found: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a NumPy array of tokens ({str(error).splitlines()[0]}); save it again") from None
    return found


def _check_width(file: SourceFile, dtype: np.dtype[Any], vocab: int) -> None:
    """Refuse tokens of another width than is said: read as too narrow ones, each is followed by its own upper half, which is 0."""
    bits = 8 * dtype.itemsize
    found = _stream(file, dtype)[:CHUNK]  # a wrong width is wrong from the start
    for k in (8, 4, 2):  # the widest first: an int64 is two int32 as well
        words = found[: len(found) // k * k].reshape(-1, k)
        if k * dtype.itemsize > 8 or len(words) < _FEW:
            continue
        lower, upper = words[:, : k // 2], words[:, k // 2 :]
        for swap, low, high in ((False, lower, upper), (True, upper, lower)):
            bound = int(high.max())
            # most words are no zeros either: a stream that is nearly all zeros is no evidence
            mostly = float((low > 4 * bound).any(axis=1).mean()) > 0.5
            if mostly and int(high.min()) >= 0 and bound <= (vocab - 1) >> (bits * k // 2):
                wide = np.dtype(f"u{k * dtype.itemsize}")
                wide = wide.newbyteorder("S") if swap != (sys.byteorder == "big") else wide
                zeros = f"at most {bound}" if bound else "0"
                raise ValueError(
                    f"{file.path}: these are no {dtype.name} tokens: {k // 2} of every {k} are {zeros}, the upper half of"
                    f" wider ones; say dtype = {wide.name if wide.isnative else wide.str!r}"
                )


def _sidecar(file: SourceFile, dtype: str | None, vocab: int | None) -> tuple[str, int, str, int | None]:
    """dtype, vocab, tokenizer and separator of a file of tokens, from the JSON beside it or from the caller."""
    companion = beside(file.path)
    sidecar: dict[str, Any] = {}
    if companion is not None:
        read = read_json(companion)
        if not isinstance(read, dict):
            raise ValueError(
                f'{companion}: not a JSON object; it needs {{"dtype": "uint16", "vocab": ..., "tokenizer": ...}}'
            )
        sidecar = read
    for key, value in (("dtype", dtype), ("vocab", vocab)):
        if value is not None and sidecar.setdefault(key, value) != value:
            raise ValueError(
                f"{companion}: says {key} = {sidecar[key]!r}, the caller {value!r}; leave out one of the two"
            )
    own = _own_dtype(file)
    if own and sidecar.setdefault("dtype", own) != own:
        raise ValueError(f"{file.path}: holds {own}, not {sidecar['dtype']}; leave the dtype out")
    missing = [key for key in ("dtype", "vocab") if key not in sidecar]
    if missing:
        raise ValueError(
            f"{file.path}: {' and '.join(missing)} of its tokens unknown; pass them, or write"
            f' {{"dtype": "uint16", "vocab": 50257}} to {companion or file.path.with_suffix(".json")}'
        )
    kind, size, separator = sidecar["dtype"], sidecar["vocab"], sidecar.get("separator")
    if not isinstance(kind, str) or not _DTYPE.fullmatch(kind):
        raise ValueError(f"{file.path}: dtype {kind!r} of tokens is not supported; use uint16 or uint32")
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise ValueError(f"{file.path}: vocab must be a whole number of at least 2, not {size!r}")
    if not own and file.size % np.dtype(kind).itemsize:
        raise ValueError(f"{file.path}: {file.size} bytes are no whole number of {kind} tokens; check the dtype")
    return kind, size, str(sidecar.get("tokenizer", "unknown")), separator if isinstance(separator, int) else None


def _own_dtype(file: SourceFile) -> str | None:
    """The dtype that a NumPy file says itself; None for bare tokens. ``ValueError`` for a file that is something else."""
    if file.kind == "npy":
        dtype = _array(file.path).dtype
        return dtype.name if dtype.isnative else dtype.str
    with file.path.open("rb") as handle:
        head = handle.read(16)
    if head.startswith(_NUMPY):
        raise ValueError(f"{file.path}: this is a NumPy file; call it .npy")
    if kind := _LLMC.get(head[:4]):
        first = 1024 // np.dtype(kind).itemsize
        raise ValueError(
            f"{file.path}: begins with the header of llm.c; write its tokens alone, np.fromfile(path, {kind!r})[{first}:].tofile(new)"
        )
    if (what := foreign(head)) and what.startswith("packed"):
        raise ValueError(f"{file.path}: the file is {what}, no tokens; unpack it first, or leave it out")
    return None
