"""Text to tokens: by bytes, by a ``tokenizers`` JSON, or not at all where the tokens exist already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.lab.data.sources import SourceFile, beside, read_json

Tokens = npt.NDArray[Any]
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


@dataclass(frozen=True)
class Encoder:
    """What turns texts into tokens.

    Attributes:
        name: what a corpus' description calls it (``Corpus.tokenizer``). vocab: tokens are below it.
        dtype: the smallest unsigned one that holds them. separator: the token between documents, where it is known.
        encode: the tokens of each text.
    """

    name: str
    vocab: int
    dtype: np.dtype[Any]
    separator: int | None
    encode: Callable[[list[str]], list[Tokens]]


def _smallest_dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if vocab <= 2**8 else np.uint16 if vocab <= 2**16 else np.uint32)


def byte_encoder() -> Encoder:
    """A token is a byte of UTF-8; byte 0 stands between documents, which no text holds: files and documents with a NUL are refused."""

    def encode(texts: list[str]) -> list[Tokens]:
        return [np.frombuffer(t.encode(), dtype=np.uint8) for t in texts]

    return Encoder("bytes", 256, np.dtype(np.uint8), 0, encode)


def tokenizer_encoder(path: Path, separator: str | None) -> Encoder:
    """The tokenizer of a ``tokenizers`` JSON.

    Args:
        path: of that JSON.
        separator: the text of the token between documents; None: the end of text as the field's tokenizers call it.

    Raises:
        ValueError: no such file, not a tokenizer, no such token, or ``tokenizers`` is not installed.
    """
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
        # No special tokens: separators are ours, and a long document comes in stretches without one between.
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.uint32) for e in encodings]

    digest = hashlib.sha256(path.read_bytes()).hexdigest()  # its name: two files of one name are often two tokenizers
    return Encoder(f"sha256:{digest}", vocab, _smallest_dtype(vocab), names[end], encode)


def padded(encoder: Encoder, vocab: int | None, tokenizer: Path | None) -> Encoder:
    """The encoder with a larger vocabulary, for models like theirs round.

    Args:
        vocab: the size that is wanted; None: the encoder's own. tokenizer: the file to name in an error.

    Raises:
        ValueError: smaller than what the encoder makes.
    """
    if vocab is None or vocab == encoder.vocab:
        return encoder
    if vocab < encoder.vocab:
        whose = "bytes" if tokenizer is None else str(tokenizer)
        raise ValueError(f"vocab = {vocab} is smaller than the {encoder.vocab} of {whose}; leave it out or enlarge it")
    return Encoder(encoder.name, vocab, _smallest_dtype(vocab), encoder.separator, encoder.encode)


def token_encoder(files: list[SourceFile], tokenizer: Path | None, dtype: str | None, vocab: int | None) -> Encoder:
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
        wanted = tokenizer_encoder(Path(tokenizer), None)
        if wanted.vocab > size or (name.startswith("sha256:") and name != wanted.name):
            raise ValueError(
                f"{files[0].path}: tokenised with {name} (vocab {size}), not with {tokenizer} (vocab {wanted.vocab});"
                " pass the tokenizer it was made with"
            )

    def encode(texts: list[str]) -> list[Tokens]:
        raise AssertionError("tokens are not tokenised again")

    return Encoder(name, size, np.dtype(kind), separator, encode)


def _sidecar(file: SourceFile, dtype: str | None, vocab: int | None) -> tuple[str, int, str, int | None]:
    """dtype, vocab, tokenizer and separator of a .bin, from the JSON beside it or from the caller."""
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
    missing = [key for key in ("dtype", "vocab") if key not in sidecar]
    if missing:
        raise ValueError(
            f"{file.path}: {' and '.join(missing)} of its tokens unknown; pass them, or write"
            f' {{"dtype": "uint16", "vocab": 50257}} to {companion or file.path.with_suffix(".json")}'
        )
    kind, size, separator = sidecar["dtype"], sidecar["vocab"], sidecar.get("separator")
    if kind not in ("uint8", "uint16", "uint32"):
        raise ValueError(f"{file.path}: dtype {kind!r} of tokens is not supported; use uint16 or uint32")
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise ValueError(f"{file.path}: vocab must be a whole number of at least 2, not {size!r}")
    if file.size % np.dtype(kind).itemsize:
        raise ValueError(f"{file.path}: {file.size} bytes are no whole number of {kind} tokens; check the dtype")
    return kind, size, str(sidecar.get("tokenizer", "unknown")), separator if isinstance(separator, int) else None
