"""A user's own function or class by name (``file.py:name``, ``module:name``, ``package.module.Name``), and what goes wrong in it.

Their code runs as ``python file.py`` would run it, neighbours and all. What it raises is told as one line that names their line,
for a traceback through ours helps nobody; the exception itself stays the cause of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mue.util.errors import nearest

_OURS = str(Path(__file__).parents[1])
_LONGEST = 300  # characters of an exception's text: torch lists every key of a state dict


class UserCodeError(ValueError):
    """Code of the user's failed: the text says where in it and how, ``__cause__`` is what it raised."""


def imported(name: str) -> Any:
    """What a name stands for. The file or module runs, so a user's own code has to be meant.

    Args:
        name: ``file.py:name``, whose folder is then the first place that is looked for modules, as with ``python file.py``;
            ``module:name`` or ``package.module.Name``, looked for in the current folder first.

    Raises:
        ValueError: no such file, module or attribute, with the nearest one.
        UserCodeError: it cannot be run to its end.
    """
    where, _, attribute = name.rpartition(":" if ":" in name else ".")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_path(where)
    if not hasattr(module, attribute):
        raise ValueError(f"{where} has no {attribute!r}{nearest(attribute, [n for n in vars(module) if n[:1] != '_'])}")
    return getattr(module, attribute)


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_mue_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path} does not exist; give MODEL as file.py:function or module:function")
    _look_first_in(str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    with user_code(str(path)):
        spec.loader.exec_module(module)
    return module


def _from_path(name: str) -> Any:
    _look_first_in("")  # the folder that the command was given in
    try:
        with user_code(name):
            return importlib.import_module(name)
    except UserCodeError as failed:
        lacking = failed.__cause__
        # it, or a package that it would be in; what it imports itself is the other case
        if isinstance(lacking, ModuleNotFoundError) and f"{name}.".startswith(f"{lacking.name}."):
            raise ValueError(f"{name} cannot be imported ({lacking}); give MODEL as file.py:function") from lacking
        raise


def _look_first_in(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


def not_taken(call: Any, *arguments: Any) -> str:
    """Why something cannot be called with these arguments, in Python's words; empty where it can, or where nobody knows.

    Args:
        call: a function or a class, which is not called.
    """
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError as error:
        return str(error)
    except ValueError:  # some built-in ones have no signature
        return ""
    return ""


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Where the user's code runs: what it raises becomes a :class:`UserCodeError` that names their line.

    Args:
        name: what messages call the code.

    Raises:
        UserCodeError: it raised anything, ``SystemExit`` too (a script without ``if __name__ == "__main__"``).
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, UserCodeError):
        raise
    except BaseException as error:
        frames = _frames(error)
        if _is_ours(error) and all(file.startswith(_installed()) for file, _ in frames):
            raise  # an answer of ours, to code of nobody's
        told = where_raised(error)
        raise UserCodeError(told if told.startswith(f"{name}, line ") else f"{name}: {told}") from error


def where_raised(error: BaseException) -> str:
    """An exception in one line: the last line of the user's own code that it passed through, then what it is.

    Args:
        error: with its traceback. Of frames in installed packages, the standard library and ours none is the user's, but
            where there are no others. A ValueError of ours is an answer, and keeps its lines.
    """
    kind, text = type(error).__name__, " ".join(str(error).split())
    said = f"{kind}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}" if text else kind
    if isinstance(error, SyntaxError) and error.filename:  # raised by the compiler, so no frame is theirs
        return _placed(error.filename, error.lineno, f"{kind}: {error.msg}")
    frames = _frames(error)
    theirs = [frame for frame in frames if not frame[0].startswith(_installed())] or frames
    said = str(error) if _is_ours(error) else said
    return _placed(*theirs[-1], said) if theirs else said


def _frames(error: BaseException) -> list[tuple[str, int]]:
    """File and line of every frame that is not ours, from the outermost."""
    every = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    return [frame for frame in every if not frame[0].startswith((_OURS, "<"))]


def _is_ours(error: BaseException) -> bool:
    """Was it raised by a file of ours, on purpose?"""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and last.f_code.co_filename.startswith(_OURS)


def _placed(file: str, line: int | None, said: str) -> str:
    path = Path(file)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    code = linecache.getline(file, line or 0).strip()
    return f"{shown}, line {line}{f', `{code}`' if code else ''}: {said}"


def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(dict.fromkeys(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")))
