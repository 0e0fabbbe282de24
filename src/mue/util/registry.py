"""Things of one kind by name, each written in a file of its own: rules, routers, tasks, samplers, checks, stacks.

    RULES = Registry("rule", home="mue.rules")

    @RULES.register("mine")            # in mine.py, ours or yours
    def mine(...): ...

Ours are found in the ``home`` folder. Yours are there once their module is imported; so that the command line, plan files and
the processes of a sweep find them too, your package names that module under the entry point group ``mue.plugins``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from threading import RLock
from typing import Generic, TypeVar

from mue.util.errors import nearest

PLUGINS = "mue.plugins"  # the entry point group: each entry names a module that registers something when it is imported
Entry = TypeVar("Entry")


class UnknownNameError(ValueError):
    """Nothing is registered under that name in this process."""


class Registry(Mapping[str, Entry], Generic[Entry]):
    """What is registered of one kind, in the order of ``place``, then of their names.

    Attributes:
        kind: the word for one of them, as messages say it. home: the package whose files register ours.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, tuple[float, Entry]] = {}
        self._load_home, self._load_plugins = _Once(self._import_home), _Once(self._import_plugins)

    def register(self, name: str, place: float = 100.0) -> Callable[[Entry], Entry]:
        """A decorator that puts what it decorates under ``name``; ``place`` is where tables list it.

        Raises:
            ValueError: the name is taken by something else. (The same definition in a module that is loaded again replaces itself.)
        """

        def add(entry: Entry) -> Entry:
            if not _origin(entry).startswith(self.home.partition(".")[0] + "."):
                self._load_home()  # or yours would pass for ours of that name, until somebody reads it
            if name in self._entries and _source(self._entries[name][1]) != _source(entry):
                taken = _origin(self._entries[name][1])
                raise ValueError(f"{self.kind} {name!r} is there already ({taken}): give {_origin(entry)} another name")
            self._entries[name] = (place, entry)
            return entry

        return add

    def lookup(self, name: str) -> Entry:
        """What ``name`` stands for; :class:`UnknownNameError` with the nearest known name for any other."""
        try:
            if isinstance(name, str) and name in self:
                return self._entries[name][1]
            known, lacking = list(self), ""
        except ModuleNotFoundError as error:  # torch, say, which what is registered already did without
            if not error.name or error.name.partition(".")[0] == self.home.partition(".")[0]:
                raise
            known, lacking = list(self._entries), f" (to see whether there is another, install {error.name})"
        raise UnknownNameError(f"unknown {self.kind} {name!r}{nearest(str(name), known)}{lacking}")

    def __getitem__(self, name: str) -> Entry:
        # The cheapest first: its own file, all of ours, then the plugins, for which every installed package is looked at.
        for load in (partial(self._load_file, name), self._load_home, self._load_plugins):
            if name in self._entries:
                break
            load()
        return self._entries[name][1]

    def __iter__(self) -> Iterator[str]:
        self._load_home()
        self._load_plugins()
        return iter(sorted(self._entries, key=lambda name: (self._entries[name][0], name)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _load_file(self, name: str) -> None:
        """Import the file that bears the name, where there is one: planning by one rule then reads one."""
        file = name.replace("-", "_")
        if file.isidentifier() and find_spec(f"{self.home}.{file}"):
            import_module(f"{self.home}.{file}")

    def _import_home(self) -> None:
        for module in iter_modules(import_module(self.home).__path__):
            import_module(f"{self.home}.{module.name}")

    def _import_plugins(self) -> None:
        from importlib.metadata import entry_points  # 25 ms, a third of the time that `import mue` takes

        for plugin in entry_points(group=PLUGINS):
            try:
                plugin.load()
            except Exception as error:
                raise ValueError(
                    f"the plugin {plugin.name} ({plugin.value}) cannot be imported: {type(error).__name__}: {error};"
                    " mend or uninstall the package that names it"
                ) from error


class _Once:
    """What is done when it is first needed. Other threads wait for the whole of it, and what fails is done anew for the next to ask."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do, self._lock, self._begun, self._done = do, RLock(), False, False

    def __call__(self) -> None:
        if self._done:
            return
        with self._lock:
            if self._begun:  # by this thread: what is imported may ask for what is registered so far
                return
            self._begun = True
            try:
                self._do()
                self._done = True
            finally:
                self._begun = self._done


def _origin(entry: object) -> str:
    if where := getattr(entry, "defined_in", None):  # data, which no module or name belongs to by itself
        return str(where)
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"


def _source(entry: object) -> str:
    """Its origin with the module's file in place of the module's name: a script that is a plugin too is loaded under two names,
    and ``mue check train.py:build`` loads a file under a third."""
    origin = module = _origin(entry)
    while module and module not in sys.modules:
        module = module.rpartition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    return origin if file is None else f"{file}:{origin[len(module) :]}"
