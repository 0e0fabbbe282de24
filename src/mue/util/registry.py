"""Things of one kind by name, each written in a file of its own: rules, routers, tasks, samplers, checks, stacks.

    RULES = Registry("rule", home="mue.rules")

    @RULES.register("mine")            # in mine.py, ours or yours
    def mine(...): ...

Ours are found in the ``home`` folder. Yours are there once their module is imported; so that the command line and plan files
find them too, your package names that module under the entry point group ``mue.plugins``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Generic, TypeVar

from mue.util.errors import nearest

PLUGINS = "mue.plugins"  # the entry point group: each entry names a module that registers something when it is imported
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """What is registered of one kind, in the order of ``place``, then of their names.

    Attributes:
        kind: the word for one of them, as messages say it. home: the package whose files register ours.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, tuple[float, Entry]] = {}
        self._loaded_home = self._loaded_plugins = False

    def register(self, name: str, place: float = 100.0) -> Callable[[Entry], Entry]:
        """A decorator that puts what it decorates under ``name``; ``place`` is where tables list it.

        Raises:
            ValueError: the name is taken by something else. (The same definition in a module that is loaded again replaces itself.)
        """

        def add(entry: Entry) -> Entry:
            if name in self._entries and _origin(self._entries[name][1]) != _origin(entry):
                taken = _origin(self._entries[name][1])
                raise ValueError(f"{self.kind} {name!r} is there already ({taken}): give {_origin(entry)} another name")
            self._entries[name] = (place, entry)
            return entry

        return add

    def lookup(self, name: str) -> Entry:
        """What ``name`` stands for; ``ValueError`` with the nearest known name for any other."""
        if not isinstance(name, str) or name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}{nearest(str(name), self)}")
        return self._entries[name][1]

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

    def _load_home(self) -> None:
        if self._loaded_home:
            return
        self._loaded_home = True  # before the imports: one of them may ask for what is registered so far
        try:
            for module in iter_modules(import_module(self.home).__path__):
                import_module(f"{self.home}.{module.name}")
        except BaseException:
            self._loaded_home = False  # or the next to ask would find a part of it, and no error
            raise

    def _load_plugins(self) -> None:
        if self._loaded_plugins:
            return
        from importlib.metadata import entry_points  # 25 ms, a third of the time that `import mue` takes

        self._loaded_plugins = True
        for plugin in entry_points(group=PLUGINS):
            try:
                plugin.load()
            except Exception as error:
                self._loaded_plugins = False
                raise ValueError(
                    f"the plugin {plugin.name} ({plugin.value}) cannot be imported: {type(error).__name__}: {error};"
                    " mend or uninstall the package that names it"
                ) from error


def _origin(entry: object) -> str:
    if where := getattr(entry, "defined_in", None):  # data, which no module or name belongs to by itself
        return str(where)
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"
