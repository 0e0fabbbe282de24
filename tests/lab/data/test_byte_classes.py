"""Classes of bytes, against what Python says of each character."""

from __future__ import annotations

import unicodedata

from mue.lab.data.byte_classes import BYTE_CLASSES, byte_class


def expected(byte: int) -> str:
    character = chr(byte)
    if byte > 127:
        return "other"
    if character.isalpha():
        return "letters"
    if character.isdigit():
        return "digits"
    if character.isspace() and byte not in range(0x1C, 0x20):  # Python counts four separators of old terminals
        return "white space"
    return "other" if unicodedata.category(character) == "Cc" else "punctuation"


def test_every_byte_has_its_class_and_what_is_no_byte_is_other() -> None:
    assert [BYTE_CLASSES[c] for c in byte_class(256)] == [expected(b) for b in range(256)]
    assert len(byte_class(300)) == 300 and {BYTE_CLASSES[c] for c in byte_class(300)[256:]} == {"other"}
    assert len(byte_class(100)) == 100
