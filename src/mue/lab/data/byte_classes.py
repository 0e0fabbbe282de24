"""Classes of bytes: what an expert may specialise in where a token is a byte."""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt

BYTE_CLASSES = ("letters", "digits", "white space", "punctuation", "other")
"""ASCII's four, and all else: controls, the separator of documents, and what characters beyond ASCII are made of."""


def byte_class(vocab: int) -> npt.NDArray[np.int64]:
    """(vocab,) the place in :data:`BYTE_CLASSES` of each token; tokens past the bytes (a padded vocabulary) are other."""
    table = np.full(max(vocab, 256), len(BYTE_CLASSES) - 1, dtype=np.int64)
    for place, characters in enumerate((string.ascii_letters, string.digits, string.whitespace, string.punctuation)):
        table[list(characters.encode())] = place
    return table[:vocab]
