"""Text ↔ the tokens of a run: bytes, or a ``tokenizers`` JSON."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mue.lab.data.encode import BYTES, Encoder, byte_encoder, tokenizer_encoder
from mue.util.files import read_text

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # what SentencePiece calls a byte of a character that it has no token for


class TextTokens:
    """The tokens of one run's text.

    Args:
        encoder: text to tokens, as the corpus was made. path: of the tokenizer; None for bytes. end: the text of the token between documents,
            where it is not what tokenizers call it.

    Attributes:
        separator: the token between documents; None where nobody knows.
    """

    def __init__(self, encoder: Encoder, path: Path | None = None, end: str | None = None) -> None:
        self.encoder, self.path, self.separator, self.end = encoder, path, encoder.separator, end
        self._tokenizer: Any = None
        self._special: set[int] = set()
        self._raw = {byte: bytes([byte]) for byte in range(256)}  # tokens that are bytes, and not characters
        if path is not None:
            from tokenizers import Tokenizer

            saved = json.loads(read_text(path))
            self._tokenizer = Tokenizer.from_str(read_text(path))
            # a separator that was added is no part of a text, whether the file calls it special or not
            self._special = {
                t["id"] for t in saved.get("added_tokens") or () if t.get("special") or t["id"] == self.separator
            }
            self._raw = _raw_bytes(self._tokenizer, saved)

    @cached_property
    def bytes_of(self) -> list[int]:
        """How many bytes of UTF-8 each token stands for, by its id; a token between documents of a tokenizer stands for none. (A byte is a
        token of its own where tokens are bytes, and there the separator is one, too.)"""
        if self._tokenizer is None:
            return [1] * self.encoder.vocab
        out = [0] * self.encoder.vocab
        names: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # between two others: some decoders write a blank before a token and some after it, and none at the ends of a text
        around = sorted(i for name, i in names.items() if name.isalpha() and i not in self._special)[:1]
        others = [i for i in names.values() if i not in self._raw and i not in self._special]
        texts = self._tokenizer.decode_batch([[*around, i, *around] for i in others], skip_special_tokens=False)
        alone = len(self._text(around * 2).encode())
        for i, text in zip(others, texts, strict=True):
            out[i] = len(text.encode()) - alone
        for i, raw in self._raw.items():
            out[i] = 0 if i in self._special else len(raw)
        return out

    def encode(self, text: str) -> list[int]:
        """The tokens of a beginning of a text; of an empty one the separator, after which every document begins.

        Raises:
            ValueError: nothing to begin with.
        """
        [tokens] = self.encoder.encode([text])
        found = [int(token) for token in tokens] or ([] if self.separator is None else [self.separator])
        if not found:
            raise ValueError("the prompt is empty, and this run's text has no token between documents to begin with")
        return found

    def decoder(self, after: Sequence[int] = ()) -> Callable[[int], str]:
        """A function from the next token to the text that is known for certain with it: characters of several tokens come whole.

        Args:
            after: the tokens before the first, all of whose text is known. Many tokenizers write the first of a text without its blank.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # one token is context enough, and a document begins as a text does
        before = [token for token in after[-1:] if token != self.separator]

        def next_text(token: int) -> str:
            raw = self._raw.get(token)
            if raw is None:
                # what was begun is no character
                new = utf8.decode(b"", final=True) + self._text([*before, token])[len(self._text(before)) :]
            else:
                new = utf8.decode(raw)
            before[:] = [] if token == self.separator else [token]
            return new

        return next_text

    def _text(self, tokens: Sequence[int]) -> str:
        """Of tokens on their own; "" where tokens are bytes, of which a padded vocabulary has more than 256."""
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def tokens_of(data: Mapping[str, Any], tokenizer: Path | None = None) -> TextTokens | None:
    """The tokens of a run's data.

    Args:
        data: as the run keeps it (:func:`mue.lab.data.spec.describe_data`). tokenizer: where its file is now; None: where it was.

    Returns:
        None where the run read tokens that somebody else had made, and no tokenizer is given.

    Raises:
        ValueError: the run's data are no text; the tokenizer's file is gone, or is another than the run's.
    """
    if "tokenizer" not in data:
        raise ValueError("the run was trained on images, which have no tokens of text: mue sample draws from it")
    name, source = data["tokenizer"], data.get("source", {})
    if name == BYTES:
        if tokenizer is not None:
            raise ValueError(f"the run's tokens are bytes: leave --tokenizer {tokenizer} out")
        return TextTokens(byte_encoder())
    path = tokenizer or (Path(source["tokenizer"]) if "tokenizer" in source else None)
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"the run's tokenizer {path} is not there: say where it is with --tokenizer")
    encoder = tokenizer_encoder(path, source.get("separator"))
    if encoder.name != name and name.startswith("sha256:"):
        raise ValueError(
            f"{path} is another tokenizer than the run's ({encoder.name[:23]}…, trained with {name[:23]}…)"
        )
    if encoder.vocab > (size := data.get("vocab", encoder.vocab)):
        raise ValueError(
            f"{path} has {encoder.vocab} tokens, and the run's text has {size}: it is another tokenizer than the run's"
        )
    return TextTokens(encoder, path)


def byte_characters() -> dict[int, str]:
    """The printable character as which byte-level tokenizers write each byte: Latin-1's own where it has one, else the next from 256 on
    (GPT-2's vocabulary)."""
    own = [b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


def _raw_bytes(tokenizer: Any, saved: Mapping[str, Any]) -> dict[int, bytes]:
    """The bytes of those tokens of a tokenizer that stand for bytes, which need not be whole characters.

    That is all of a byte-level tokenizer, and of SentencePiece's those for characters that it does not have.
    """
    names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if "ByteLevel" not in json.dumps([saved.get("decoder"), saved.get("pre_tokenizer")]):
        return {token: bytes.fromhex(found[1]) for name, token in names.items() if (found := _BYTE.fullmatch(name))}
    added = {t["id"] for t in saved.get("added_tokens") or ()}
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    return {
        # what was added is written as it is
        token: name.encode() if token in added or not bytes_of.keys() >= set(name) else bytes(bytes_of[c] for c in name)
        for name, token in names.items()
    }
