"""What the commands write, on any terminal: a character that it lacks is written in plain ones, and no result is lost for it.

:func:`plain_streams` does that for all that is printed. What is a file's content rather than words for people goes through
:func:`print_file` or :func:`print_json`, so that ``mue ... > FILE`` holds the same whatever the terminal's encoding.
"""

from __future__ import annotations

import codecs
import io
import json
import sys
import unicodedata
from typing import Any

# One character for one, since tables and drawings are laid out before they are written.
_DRAWN = {
    "-": "─━═╌╴╶−–—", "|": "│┃‖", "+": "╭╮╰╯┌┐└┘├┤┬┴┼╞╡╪", "x": "×✗", "~": "∝≈", "*": "•·", "o": "○", "^": "▲", "v": "▼", "=": "⇄",
    '"': "“”", "'": "‘’′",
}  # fmt: skip
_PLAIN = {
    "√": "sqrt", "≤": "<=", "≥": ">=", "±": "+-", "→": "->", "←": "<-", "↔": "<->", "…": "...", "✓": "ok", "½": "1/2", "∞": "inf",
    "²": "^2", "³": "^3", "⁹": "^9", "⁻": "^-", "ᵀ": "^T", "₀": "0", "₁": "1", "₂": "2", "µ": "mu", "λ": "lambda",
    **{character: one for one, many in _DRAWN.items() for character in many},
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
}  # fmt: skip


def plain(text: str) -> str:
    """The text in ASCII; a character that has no plain form stands as its escape, which Python and JSON read back."""
    return text.encode("ascii", _ERRORS).decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """An error handler (``codecs.register_error``) that puts plain characters in the place of those that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character.isascii() or character in _PLAIN:
        return _PLAIN.get(character, character)
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name:  # ρ_d is called rho_d
        return name.rpartition(" ")[2].title() if "CAPITAL" in name else name.rpartition(" ")[2].lower()
    return character.encode("ascii", "backslashreplace").decode()


_ERRORS = "mue-plain"
codecs.register_error(_ERRORS, _replace)


def plain_streams() -> None:
    """Let stdout and stderr write in plain characters what their encoding lacks: Latin-1, a Windows code page, ASCII, or a file
    name that is no UTF-8. A character in a table ended a sweep of hours before its report was written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def print_file(text: str) -> None:
    """Print what is to become a file (code, Markdown). Where stdout is not UTF-8 it is ASCII, which is UTF-8 as well: Python
    refuses a source with a Latin-1 × in a comment."""
    print(text if _utf8() else plain(text), end="")


def print_json(data: Any, indent: int | None = 1) -> None:
    """Print data as JSON that reads back the same in any encoding."""
    print(json.dumps(data, indent=indent, ensure_ascii=not _utf8()), flush=True)


def _utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").startswith("utf8")
