"""Text ↔ the tokens of a run: bytes, or a ``tokenizers`` JSON."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mue.lab.data.encode import BYTES, Encoder, byte_encoder, tokenizer_encoder
from mue.util.files import read_text

_PARTIAL = "\ufffd"  # what a decoder writes for a character that is not whole yet


class TextTokens:
    """The tokens of one run's text.

    Args:
        encoder: text to tokens, as the corpus was made. path: of the tokenizer; None for bytes. end: the text of the token between documents,
            where it is not what tokenizers call it.

    Attributes:
        separator: the token between documents; None where nobody knows.
        bytes_of: how many bytes of UTF-8 each token stands for, by its id; a token between documents of a tokenizer stands for none. (A byte
            is a token of its own where tokens are bytes, and there the separator is one, too.)
    """

    def __init__(self, encoder: Encoder, path: Path | None = None, end: str | None = None) -> None:
        self.encoder, self.path, self.separator, self.end = encoder, path, encoder.separator, end
        self._tokenizer: Any = None
        if path is not None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(read_text(path))
        self.bytes_of = [1] * encoder.vocab if path is None else _bytes_of(self._tokenizer, json.loads(read_text(path)))

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

    def decoder(self) -> Callable[[int], str]:
        """A function from the next token to the text that is known for certain with it: characters of several tokens come whole."""
        if self._tokenizer is None:
            bytewise = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return lambda token: bytewise.decode(bytes([token]) if token < 256 else b"")
        seen: list[int] = []
        said = ""

        def next_text(token: int) -> str:
            nonlocal said
            seen.append(token)
            text: str = self._tokenizer.decode(seen, skip_special_tokens=False)
            if text.endswith(_PARTIAL) and len(seen) < 8:
                return ""
            new = text[len(said) :]
            # the last token stays, since some decoders write the first of a text without its blank
            seen[:] = seen[-1:]
            said = self._tokenizer.decode(seen, skip_special_tokens=False)
            return new

        return next_text


def tokens_of(data: Mapping[str, Any], tokenizer: Path | None = None) -> TextTokens | None:
    """The tokens of a run's data.

    Args:
        data: as the run keeps it (:func:`mue.lab.data.spec.describe_data`). tokenizer: where its file is now; None: where it was.

    Returns:
        None where the run read tokens that somebody else had made, and no tokenizer is given.

    Raises:
        ValueError: the tokenizer's file is gone, or is another than the run's.
    """
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


def _bytes_of(tokenizer: Any, saved: Mapping[str, Any]) -> list[int]:
    """How many bytes each token of a tokenizer stands for."""
    names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added = {t["id"]: bool(t.get("special")) for t in saved.get("added_tokens") or ()}
    # a byte-level vocabulary (GPT-2) writes every byte as one character
    bytewise = "ByteLevel" in json.dumps(saved.get("decoder")) or "ByteLevel" in json.dumps(saved.get("pre_tokenizer"))
    anchor = next((i for n, i in names.items() if i not in added and n.isalpha()), None)
    before = [] if anchor is None else [anchor]
    alone = len(tokenizer.decode(before).encode()) if before else 0
    out = [0] * (max(names.values()) + 1)
    for name, token in names.items():
        if token in added:
            out[token] = 0 if added[token] else len(name.encode())
        elif bytewise:
            out[token] = len(name)
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            out[token] = 1  # a byte that no other token has (SentencePiece)
        else:
            out[token] = len(tokenizer.decode([*before, token]).encode()) - alone
    return out
