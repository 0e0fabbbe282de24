"""Things by name: found in their home folder, by a decorator, or through an installed package; never two of one name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mue
from mue.rules.registry import RULES
from mue.util.registry import Registry, UnknownNameError

Kinds = Registry[Callable[[], str]]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kinds]:
    """A registry whose home is an empty package; what is written beside it can be imported."""
    write(tmp_path, "home/__init__.py", "")
    yield from _at(tmp_path, monkeypatch)


def _at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kinds]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    registry: Kinds = Registry("kind", home="home")
    monkeypatch.setattr(mue, "kinds_under_test", registry, raising=False)
    yield registry
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def registers(name: str, function: str = "build") -> str:
    return f"import mue\n@mue.kinds_under_test.register({name!r})\ndef {function}():\n    return {name!r}\n"


def install(folder: Path, module: str) -> None:
    """A distribution as pip leaves it, which names ``module`` as a plugin."""
    write(folder, "theirs-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    write(folder, "theirs-1.0.dist-info/entry_points.txt", f"[mue.plugins]\ntheirs = {module}\n")
    importlib.invalidate_caches()


def test_what_lies_in_the_home_folder_is_there_without_an_import(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/one.py", registers("one"))
    write(tmp_path, "home/other.py", registers("other"))
    assert empty["other"]() == "other" and list(empty) == ["one", "other"] and len(empty) == 2
    assert "one" in empty and "third" not in empty


def test_threads_that_ask_at_once_all_wait_for_the_whole_home(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/first.py", "import time\ntime.sleep(0.3)\n")
    write(tmp_path, "home/second.py", registers("late"))  # no file bears the name
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: empty.lookup("late")(), range(4))) == ["late"] * 4


def test_order_is_by_place_then_by_name(empty: Kinds) -> None:
    for name, place in (("last", None), ("second", 2), ("after the last", None), ("first", 1)):
        (empty.register(name) if place is None else empty.register(name, place=place))(lambda name=name: name)
    assert list(empty) == ["first", "second", "after the last", "last"]  # whatever was looked up, and so read, first


def test_one_name_is_one_thing(empty: Kinds) -> None:
    @empty.register("mine")
    def mine() -> str:
        return "mine"

    def other() -> str:
        return "other"

    with pytest.raises(ValueError, match=r"kind 'mine' is there already \(.*mine\): give .*other another name"):
        empty.register("mine")(other)
    assert empty["mine"] is mine
    again = mine
    assert empty.register("mine")(again) is mine  # the same definition once more is no second one


def test_the_name_of_one_of_ours_is_taken_before_anybody_asked_for_it(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/ours.py", registers("mine", "ours"))
    write(tmp_path, "theirs.py", registers("mine", "theirs"))
    with pytest.raises(
        ValueError, match=r"'mine' is there already \(home.ours.ours\): give theirs.theirs another name"
    ):
        importlib.import_module("theirs")
    assert empty["mine"].__module__ == "home.ours"


def test_a_module_that_is_loaded_again_replaces_its_own(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "theirs.py", registers("mine"))
    module = importlib.import_module("theirs")
    before = empty["mine"]
    importlib.reload(module)
    assert empty["mine"] is not before and empty["mine"]() == "mine" and len(empty) == 1


def test_an_unknown_name_is_refused_with_the_nearest(empty: Kinds) -> None:
    empty.register("softmax")(lambda: "")
    with pytest.raises(ValueError, match=r"unknown kind 'softmx'; did you mean 'softmax'\?"):
        empty.lookup("softmx")
    with pytest.raises(ValueError, match="unknown kind 3; known: softmax"):
        empty.lookup(3)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        empty["softmx"]


def test_a_home_that_needs_another_package_is_no_reason_for_a_traceback(empty: Kinds, tmp_path: Path) -> None:
    """What needs no torch stands outside the folder that does, and a typing error in its name is answered without."""
    registry = mue.kinds_under_test = Registry("kind", home="home.folder")  # type: ignore[attr-defined]
    write(tmp_path, "home/light.py", registers("softmax"))
    write(tmp_path, "home/folder/__init__.py", "")
    write(tmp_path, "home/folder/heavy.py", "import no_such_package\n")
    importlib.import_module("home.light")
    with pytest.raises(UnknownNameError, match=r"'softmx'; did you mean 'softmax'\? .*install no_such_package"):
        registry.lookup("softmx")
    assert registry.lookup("softmax")() == "softmax"
    write(tmp_path, "home/folder/heavy.py", "import home.no_such_file  # a fault of ours stays one\n")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="no_such_file"):
        registry.lookup("softmx")


def test_an_installed_package_brings_its_own(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "theirs.py", registers("theirs"))
    assert "theirs" not in empty  # a file that nobody names is no plugin
    install(tmp_path, "theirs")
    fresh: Kinds = Registry("kind", home="home")
    mue.kinds_under_test = fresh  # type: ignore[attr-defined]
    assert fresh.lookup("theirs")() == "theirs" and list(fresh) == ["theirs"]


def test_a_plugin_that_cannot_be_imported_is_named_every_time(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/ours.py", registers("ours"))
    write(tmp_path, "broken.py", "import no_such_package\n")
    install(tmp_path, "broken")
    assert empty["ours"]() == "ours"  # ours does not depend on what others installed
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"the plugin theirs \(broken\) cannot be imported: ModuleNotFoundError.*mend"
        ):
            list(empty)


def test_a_home_file_that_cannot_be_imported_is_an_error_every_time(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/broken.py", "raise RuntimeError('broken')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            empty.lookup("anything")


def test_our_own_rules_are_in_such_a_registry() -> None:
    assert next(iter(RULES)) == "complete-mue" and mue.RULES is RULES


def test_a_name_reads_the_file_that_bears_it_and_no_other(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "home/one_kind.py", registers("one-kind"))
    write(tmp_path, "home/broken.py", "raise RuntimeError('not to be read')")
    assert empty["one-kind"]() == "one-kind"
    with pytest.raises(RuntimeError, match="not to be read"):
        list(empty)


def test_a_script_that_is_a_plugin_too_registers_the_same_thing(empty: Kinds, tmp_path: Path) -> None:
    write(tmp_path, "theirs.py", registers("theirs"))
    first = importlib.import_module("theirs")
    spec = importlib.util.spec_from_file_location("__theirs_again__", tmp_path / "theirs.py")
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = again
    spec.loader.exec_module(again)  # as `python theirs.py` has it, whose module is __main__
    assert empty["theirs"] is again.build and again.build is not first.build
    write(tmp_path, "copy_of_theirs.py", registers("theirs"))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="is there already"):  # another file is another thing
        importlib.import_module("copy_of_theirs")
