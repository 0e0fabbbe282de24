"""Settings of a router: what a file may say of it beyond the numbers that every router has, each checked on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mue.util.errors import nearest


class Chosen(dict[str, Any]):
    """A dictionary that stays as it is, so that a shape that holds one can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((name, repr(value)) for name, value in self.items())))

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError("settings of a shape do not change: make another with dataclasses.replace")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Chosen, (dict(self),)  # the default would set items one by one

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Chosen:
        return self


NO_SETTINGS = Chosen()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One number or word that a router can be given: what it is where nobody says anything, and what it may be.

    Attributes:
        default: a float, a whole number, true or false, or one of ``choices``; its type is what a value has to be. None with
            ``kind``: the router finds it where nobody says anything.
        meaning: in a few words, for tables and help.
        low, high: the bounds of a number. low_open, high_open: the bound itself is not allowed.
        choices: of a word; empty for a number.
        kind: ``float``, ``int``, ``bool`` or ``str``; read off the default where there is one.
    """

    default: float | int | bool | str | None
    meaning: str = ""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    kind: type | None = None

    def __post_init__(self) -> None:
        kind = self.kind or type(self.default)
        if kind not in (float, int, bool, str) or (kind is str) != bool(self.choices):
            raise ValueError(
                f"a setting is a float, an int, a bool or a word out of choices, got default {self.default!r}, kind {self.kind}"
            )
        object.__setattr__(self, "kind", kind)
        if self.default is not None:
            self.checked("default", self.default)

    def checked(self, name: str, value: object) -> Any:
        """A user's value as the plain one of this setting's kind.

        Args:
            name: what messages call it.

        Raises:
            ValueError: it is of another kind, none of the choices, or out of bounds.
        """
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            return value
        if self.kind is str:
            if value not in self.choices:
                raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}{self._close(value)}")
            return value
        return self._number(name, value)

    def _close(self, value: object) -> str:
        close = nearest(str(value), self.choices)
        return close if "did you mean" in close else ""

    def _number(self, name: str, value: object) -> float | int:
        whole, plain = self.kind is int, None
        wrong = f"{name} must be a {'whole ' if whole else ''}number{self._bounds()}, got {value!r}"
        if isinstance(value, str):
            wrong += ", which is text: leave the quotes out"
        if isinstance(value, Real) and not isinstance(value, bool):  # numpy's, too
            plain = int(value) if isinstance(value, Integral) else float(value)
        if plain is None or not math.isfinite(plain) or (whole and plain != int(plain)):
            raise ValueError(wrong)
        number = int(plain) if whole else float(plain)
        below = number <= self.low if self.low_open else number < self.low
        above = number >= self.high if self.high_open else number > self.high
        if below or above:
            raise ValueError(wrong)
        return number

    def _bounds(self) -> str:
        """The range in words, for messages."""
        parts = []
        if math.isfinite(self.low):
            parts.append(f"{'above' if self.low_open else 'of at least'} {self.low:g}")
        if math.isfinite(self.high):
            parts.append(f"{'below' if self.high_open else 'at most'} {self.high:g}")
        return (" " if parts else "") + " and ".join(parts)


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as a line has them: ``p 0.3, losses (entropy 0.001)``."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, Mapping):
            return f"({as_text(value)})" if value else "none"
        return "found at init" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())
