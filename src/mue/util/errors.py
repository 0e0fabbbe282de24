"""What a user gave, checked: a number within its bounds, or an error of one line that names it and the nearest that is known."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

from mue.util.text import yaml_number

C = TypeVar("C", bound=Callable[..., Any])

LARGEST = 10**18  # beyond any shape or run, and well inside what a float holds


def positive_int(name: str, value: object, most: int = LARGEST) -> int:
    """A user's number as a positive whole number; numpy's integers and ``64.0`` are whole numbers, too.

    Args:
        name: what messages call it. value: anything; true and false are no numbers here.
        most: the largest that is allowed, for what is counted one by one (layers, experts).

    Returns:
        A plain ``int``, which files and hashes hold alike, wherever the number came from.

    Raises:
        ValueError: it is none, below 1, or above ``most``.
    """
    number = _plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {_shown(value)}")
    if number > most:
        limit = "10^18" if most == LARGEST else f"{most:,}"
        raise ValueError(f"{name} must be at most {limit}, got a number of {len(str(number))} digits")
    return number


def _shown(value: object) -> str:
    """A value that is refused, and what to do about it where it is only written as text."""
    if not isinstance(value, str):
        return repr(value)
    try:
        float(value)
    except ValueError:
        return f"{value!r}, which is text: leave the quotes out" if value.lower() in ("true", "false") else repr(value)
    yaml = f" (in YAML: {yaml_number(float(value))})" if "e" in value.lower() else ""
    return f"{value!r}, which is text: leave the quotes out{yaml}"


def _plain(value: object) -> int | float | None:
    """Python's own number for any kind of one (numpy's, fractions); None for what is none."""
    if isinstance(value, bool):
        return None
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else None


def positive(name: str, value: object, *, zero: bool = False, below: float = math.inf) -> float:
    """A user's number as a finite one above 0.

    Args:
        name: what messages call it. value: anything; true and false are no numbers here.
        zero: 0 is allowed too. below: the result must be less than this.

    Raises:
        ValueError: naming the number and the bound that it breaks.
    """
    number = _plain(value)
    if isinstance(number, int) and abs(number) > LARGEST:
        raise ValueError(f"{name} must be at most 10^18, got a number of {len(str(abs(number)))} digits")
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {_shown(value)}")
    if number < 0 or (number == 0 and not zero) or number >= below:
        limit = f" and below {below:g}" if below < math.inf else ""
        raise ValueError(f"{name} must be {'at least 0' if zero else 'greater than 0'}{limit}, got {value!r}")
    return float(number)


def true_or_false(name: str, value: object) -> bool:
    """A user's value as a truth value, for 0, 1 or "false" in a file is a slip.

    Args:
        name: what messages call it. value: anything.

    Raises:
        ValueError: it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_shown(value)}")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error: ``"; did you mean 'width'?"`` with the closest known word, or the list of all of them.

    Args:
        word: what was given. known: what would have been understood.
    """
    known = list(known)
    # half alike: a slip or a synonym is found, and a wholly other word shows the list instead
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def extra(name: str) -> str:
    """How one of the extras is installed, for a message: from the repository, as no package index has mue (docs/install.md).

    Args:
        name: of the extra, as in ``pyproject.toml``.
    """
    return f"pip install 'mue[{name}] @ git+<repository>'"


class CallError(TypeError, ValueError):
    """A call whose arguments do not fit: Python's ``TypeError``, and as the mistake of a user a ``ValueError`` as well."""


def explain_calls(called: C) -> C:
    """A decorator for what users call: arguments that do not fit are an error that names the nearest keyword, or those missing.

    Args:
        called: a function, or a class, of which ``__init__`` is replaced. A call that fits costs one more frame.
    """
    own = called.__init__ if inspect.isclass(called) else called
    signature = inspect.signature(called)

    @functools.wraps(own)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except TypeError as error:
            given = args[1:] if inspect.isclass(called) else args
            if isinstance(error, CallError) or not (fault := _misfit(signature, given, kwargs)):
                raise  # from inside: the call itself was right
        raise CallError(f"{called.__name__}() {fault}")

    if not inspect.isclass(called):
        return explained  # type: ignore[return-value]
    called.__init__ = explained  # type: ignore[method-assign]
    return called


def _misfit(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call does not fit, or nothing where it does."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names = [p.name for p in takes]
        for name in kwargs:
            if name not in names:
                # what is given already is not what was meant
                return (
                    f"got an unexpected keyword argument {name!r}{nearest(name, [n for n in names if n not in kwargs])}"
                )
        plain = [p.name for p in takes if p.kind is not p.KEYWORD_ONLY]
        missing = [
            p.name for p in takes if p.default is p.empty and p.name not in kwargs and p.name not in plain[: len(args)]
        ]
        if missing:
            return f"needs {' and '.join([', '.join(missing[:-1]), missing[-1]] if missing[1:] else missing)}"
        if len(args) > len(plain):
            return f"takes {', '.join(plain) or 'nothing'} without a name, and got {len(args)} values: name the others"
        return str(error)
    return ""
