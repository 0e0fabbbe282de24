"""Text to tokens: by bytes or by a ``tokenizers`` JSON. Tokens that exist already are read in ``stored_tokens``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.util.files import read_text

Tokens = npt.NDArray[Any]
BYTES = "bytes"  # the name of the tokens that need no tokenizer
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
        encode: the tokens of each text. unknown: how many characters of texts no token stands for.
        stored: the dtype in which tokens that exist already lie in their files, where it is another than ``dtype``.
    """

    name: str
    vocab: int
    dtype: np.dtype[Any]
    separator: int | None
    encode: Callable[[list[str]], list[Tokens]]
    unknown: Callable[[list[str]], int] = lambda texts: 0
    stored: np.dtype[Any] | None = None


def smallest_dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if vocab <= 2**8 else np.uint16 if vocab <= 2**16 else np.uint32)


def byte_encoder() -> Encoder:
    """A token is a byte of UTF-8; byte 0 stands between documents, which no text holds: files and documents with a NUL are refused."""

    def encode(texts: list[str]) -> list[Tokens]:
        return [np.frombuffer(t.encode(), dtype=np.uint8) for t in texts]

    return Encoder(BYTES, 256, np.dtype(np.uint8), 0, encode)


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
        tokenizer: Any = Tokenizer.from_str(read_text(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a `tokenizers` JSON ({reason}); save one with Tokenizer.save") from error
    names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    vocab = max(names.values()) + 1  # ids may have gaps, so a count would be too small
    end = separator if separator is not None else next((t for t in END_OF_TEXT if t in names), None)
    if end is None or end not in names:
        what = "no end-of-text token was recognised" if end is None else f"it has no token {end!r}"
        raise ValueError(f'{path}: {what}; name the token between documents: separator="<its text>"')
    changed = _whole_documents(tokenizer)
    _check_repeatable(path, tokenizer, names)

    def encode(texts: list[str]) -> list[Tokens]:
        # No special tokens: separators are ours, and a long document comes in stretches without one between.
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.uint32) for e in encodings]

    # Its name: two files of one name are often two tokenizers, and one that is not used as it was saved is another.
    digest = hashlib.sha256(path.read_bytes() + changed.encode()).hexdigest()
    unknown = _Unknown(tokenizer, names)
    return Encoder(f"sha256:{digest}", vocab, smallest_dtype(vocab), names[end], encode, unknown)


def _whole_documents(tokenizer: Any) -> str:
    """Switch off what whoever saved a tokenizer wanted of single examples: cut to a length, or filled up to one.

    Returns:
        What was switched off, in words; "" where nothing was on.
    """
    off = [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ", ".join(off)


def _check_repeatable(path: Path, tokenizer: Any, names: Iterable[str]) -> None:
    """Refuse a tokenizer that draws its tokens (BPE dropout, sampled unigrams): one hash would name many corpora."""
    said = {name: getattr(tokenizer.model, name, None) for name in ("dropout", "alpha", "nbest_size")}
    why = ", ".join(f"{name} = {value:g}" for name, value in said.items() if value)
    # Whatever else a model may draw by shows in the tokens that are made of most parts.
    text = " ".join(sorted(names, key=lambda name: (len(name), name))[-2000:])
    first, *again = (tokenizer.encode(text, add_special_tokens=False).ids for _ in range(3))
    if why or any(ids != first for ids in again):
        raise ValueError(
            f"{path}: it draws the tokens of a text anew each time ({why or 'two readings differ'});"
            " switch that off and save it again, e.g. tokenizer.model.dropout = None"
        )


class _Unknown:
    """Counts characters that a tokenizer drops or gives its unknown token: they are no part of what is trained on."""

    def __init__(self, tokenizer: Any, names: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        self.unknown = names.get(getattr(tokenizer.model, "unk_token", None) or "")
        self.known: dict[str, bool] = {}

    def __call__(self, texts: list[str]) -> int:
        new = sorted(set().union(*texts) - self.known.keys())
        # A character that is dropped leaves no trace however often it stands there; blanks many tokenizers drop on purpose.
        pairs = self.tokenizer.encode_batch([c * n for c in new for n in (1, 2)], add_special_tokens=False)
        for c, one, two in zip(new, pairs[::2], pairs[1::2], strict=True):
            self.known[c] = c.isspace() or (one.ids != two.ids and self.unknown not in one.ids)
        lost = {ord(c): None for c in set().union(*texts) if not self.known[c]}
        return sum(len(text) - len(text.translate(lost)) for text in texts) if lost else 0


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
    return replace(encoder, vocab=vocab, dtype=smallest_dtype(vocab))
